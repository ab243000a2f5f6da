"""The votes of a restore, over the real hub: all ranks take the same step, or all get an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks.conftest import Start
from tests.ranks.scripts import errors

pytestmark = pytest.mark.process

COMMON = """
    import os, pathlib
    from tests.ranks.at_rank import *
    run = pathlib.Path(args[0])

    def state_of(step):
        return {"own": own(rank + 100 * step), "same": torch.full((1000,), float(step)), "epoch": step}

    def look(state):
        return [state["own"].value["w"][0].item(), state["same"][0].item(), state["epoch"]]

    def damage(path):
        with open(path, "r+b") as file:
            file.seek(-1000, os.SEEK_END)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))

    def file_of(step, rank):
        return run / f"step-{step}/own/model-{rank + 1:05}-of-{world:05}.safetensors"
"""


def test_what_is_bad_is_passed_over_by_all(start: Start, tmp_path: Path) -> None:
    """A block that one rank alone reads is enough; what does not fit, or is asked for differently, is told to all."""
    job = start(
        4,
        COMMON
        + """
    with checkpointer(args[0]) as ckpt:
        say("nothing", of(lambda: ckpt.restore(state_of(0))))
        for step in (1, 2, 3):
            ckpt.save(step, state_of(step)).result()
        state = state_of(0)
        say("newest", of(lambda: ckpt.restore(state)))
        say("values", look(state))
        if rank == 0:
            damage(file_of(3, 2))
        dist.barrier()
        state = state_of(0)
        say("older", of(lambda: ckpt.restore(state)))
        say("older values", look(state))
        dist.barrier()
        if rank == 0:
            say("bad", sorted(path.name.split(".")[1] for path in run.glob(".bad-*")))

        before = state_of(0)
        if rank == 1:
            before["own"] = aiockpt.PerRank({"w": torch.zeros(7)})
        say("misfit", of(lambda: ckpt.restore(before)))
        say("untouched", before["same"][0].item())
        say("arguments", of(lambda: ckpt.restore(state_of(0), step=2 if rank == 3 else None)))
        say("absent", of(lambda: ckpt.restore(state_of(0), step=77)))
        dist.barrier()
        if rank == 0:
            damage(file_of(2, 3))
        dist.barrier()
        say("explicit", of(lambda: ckpt.restore(state_of(0), step=2)))
        dist.barrier()
        if rank == 0:
            damage(file_of(1, 1))
        dist.barrier()
        say("none good", of(lambda: ckpt.restore(state_of(0))))
    """,
        tmp_path / "run",
    )
    job.check()
    told = job.told()
    assert told["nothing"] == [None] * 4
    assert told["newest"] == [3] * 4
    assert told["values"] == [[300 + rank, 3, 3] for rank in range(4)]
    assert told["older"] == [2] * 4
    assert told["older values"] == [[200 + rank, 2, 2] for rank in range(4)]
    assert told["bad"][0] == ["bad-step-3"]
    assert errors(told["misfit"]) == ["StateMismatchError"] * 4
    assert all("rank 1" in one["text"] for one in told["misfit"])
    assert told["untouched"] == [0] * 4
    assert errors(told["arguments"]) == [errors(told["arguments"])[0]] * 4
    assert all("rank 3" in one["text"] for one in told["arguments"]), told["arguments"]
    assert errors(told["absent"]) == ["StepNotFoundError"] * 4
    assert errors(told["explicit"]) == ["CheckpointCorruptError"] * 4
    assert all("rank 3" in one["text"] for one in told["explicit"]), told["explicit"]
    assert errors(told["none good"]) == ["NoUsableCheckpointError"] * 4


def test_a_rank_that_cannot_read(start: Start, tmp_path: Path) -> None:
    """That is no proof that it is damaged: an error on all, which names the rank, and never an older step."""
    job = start(
        4,
        COMMON
        + """
    import errno
    path = f"*/step-2/own/model-00003-of-00004*"
    cannot = (rule("trainer.read", "errno", errno=errno.EIO, path=path),) if rank == 2 else ()
    with checkpointer(args[0], trainer_faults=cannot) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state_of(step)).result()
        say("unreadable", of(lambda: ckpt.restore(state_of(0))))
        state = state_of(0)
        say("then", of(lambda: ckpt.restore(state)))
        say("values", look(state))
        workers = pids_of(ckpt)
        if rank == 0:  # the hub is replaced while all wait in their vote
            stop(workers[0])
        dist.barrier()
        if rank == 3:
            kill(workers[0])
        say("another hub", of(lambda: ckpt.restore(state)))
    """,
        tmp_path / "run",
    )
    job.check()
    told = job.told()
    assert errors(told["unreadable"]) == ["StorageError"] * 4
    assert all("rank 2" in one["text"] for one in told["unreadable"]), told["unreadable"]
    assert told["then"] == [2] * 4
    assert told["values"] == [[200 + rank, 2, 2] for rank in range(4)]
    assert told["another hub"] == [2] * 4


def test_a_rank_that_dies_in_it(start: Start, tmp_path: Path) -> None:
    """The others are told so, and who it was; they do not wait for it."""
    job = start(
        4,
        COMMON
        + """
    dies = (rule("trainer.read", "kill", path="*/own/*"),) if rank == 1 else ()
    ckpt = checkpointer(args[0], trainer_faults=dies)
    ckpt.open()
    ckpt.save(1, state_of(1)).result()
    dist.barrier()
    say("restored", seconds_of(lambda: ckpt.restore(state_of(0))))
    ckpt.close()
    end()
    """,
        tmp_path / "run",
    )
    assert job.wait() == [0, -9, 0, 0], job.report()
    for outcome, seconds in [one for one in job.told()["restored"] if one is not None]:
        assert outcome["error"] == "PeerFailedError", outcome
        assert "rank 1" in outcome["text"]
        assert seconds < 10
