"""Busy, skip, cancel, time-out and what the ranks say differently: one decision for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

import aiockpt
from tests.ranks.conftest import Start
from tests.ranks.scripts import SMALL, errors

pytestmark = pytest.mark.process


def test_one_slot_is_taken(start: Start, tmp_path: Path) -> None:
    """What one rank cannot save, none does; and what it answers late belongs to the save that it is about."""
    run = tmp_path / "run"
    job = start(
        4,
        SMALL
        + """
    with checkpointer(args[0]) as ckpt:
        ckpt.save(0, state).result()
        workers = pids_of(ckpt)
        # The time of save 1 is up while rank 1's worker stands still: its slot is taken, those of the others are free.
        if rank == 1:
            stop(workers[1])
        dist.barrier()
        late = ckpt.save(1, {"own": own(100 + rank)}, timeout=0.3)
        if rank != 1:
            say("timeout", of(late.result))
            wait_until(lambda: is_free(ckpt), "a free slot")
        dist.barrier()
        say("skip", of(lambda: ckpt.save(2, state, when_busy="skip").result()))
        dist.barrier()
        say("raise", of(lambda: ckpt.save(3, state, when_busy="raise").result()))
        dist.barrier()
        if rank == 1:  # this thread is held until the worker goes on
            waits = ckpt.save(4, state)
            say("timeout", of(late.result))
        else:
            waits = ckpt.save(4, state)
            if rank == 0:
                wake(workers[1])
        say("wait", of(waits.result))
        say("counts", [getattr(ckpt.statistics(), name) for name in ("committed", "skipped")])
        say("after", of(ckpt.save(5, state).result))
        if rank == 0:
            say("steps", ckpt.steps())
    """,
        run,
    )
    job.check()
    told = job.told()
    assert errors(told["timeout"]) == ["SaveTimeoutError"] * 4, told["timeout"]
    assert all("within 0.3 s" in one["text"] for one in told["timeout"])
    assert told["skip"] == [None] * 4
    assert errors(told["raise"]) == ["SaveBusyError"] * 4
    assert told["wait"] == [4] * 4
    assert told["after"] == [5] * 4
    assert told["steps"][0] == [0, 4, 5] or sorted(told["steps"][0]) == [0, 4, 5]
    assert all(committed == 2 and skipped == 1 for committed, skipped in told["counts"]), told["counts"]
    loaded = aiockpt.blocking.load(run, step=4)
    assert loaded["own"]["w"][0].item() == 0  # rank 0's own, of this save and not of the one before


def test_ranks_that_differ(start: Start, tmp_path: Path) -> None:
    """A save that is not the same on all ranks fails on all, with an error that says so; the next one works."""
    job = start(
        4,
        SMALL
        + """
    with checkpointer(args[0]) as ckpt:
        ckpt.save(0, state).result()
        workers = pids_of(ckpt)

        say("steps", of(ckpt.save(10 + rank // 3, state).result))
        say("arguments", of(ckpt.save(12, state, overwrite=rank == 2).result))
        dist.barrier()

        if rank == 2:
            stop(workers[2])  # so that nothing can be committed before the cancel
        dist.barrier()
        save = ckpt.save(13, state)
        if rank == 1:
            save.cancel()
        if rank != 2:
            say("cancel", of(save.result))
        dist.barrier()
        if rank == 2:
            wake(workers[2])
            say("cancel", of(save.result))

        bad = state | ({"bad": object()} if rank == 3 else {})
        say("refused", of(lambda: ckpt.save(14, bad).result()))

        say("first", of(lambda: ckpt.save(15, state, metadata={"by": rank}).result()))
        say("exists", of(lambda: ckpt.save(15, state).result()))
        state["progress"]["epoch"] = 4
        say("overwrite", of(lambda: ckpt.save(15, state, overwrite=True, metadata={"by": rank + 10}).result()))
        restored = ckpt.restore(state)
        say("metadata", restored.metadata)
    """,
        tmp_path / "run",
    )
    job.check()
    told = job.told()
    assert errors(told["steps"]) == ["PlanMismatchError"] * 4
    assert all(
        ("step 10" in one["text"] and "rank 3 step 11" in one["text"]) or "rank 3 saves step 11" in one["text"]
        for one in told["steps"]
    ), told["steps"]
    assert errors(told["arguments"]) == ["PlanMismatchError"] * 4
    assert all("overwrite=True" in one["text"] and "rank 2" in one["text"] for one in told["arguments"])
    assert errors(told["cancel"]) == ["PeerFailedError", "SaveCancelledError", "PeerFailedError", "PeerFailedError"]
    assert all(one["rank"] == 1 and "cancel" in one["text"] for i, one in enumerate(told["cancel"]) if i != 1)
    assert errors(told["refused"]) == ["PeerFailedError"] * 3 + ["UnsupportedValueError"]
    assert all(one["rank"] == 3 and "'bad'" in one["text"] for one in told["refused"][:3]), told["refused"]
    assert told["first"] == [15] * 4
    assert errors(told["exists"]) == ["StepExistsError"] * 4
    assert all(one["path"].endswith("step-15") for one in told["exists"])
    assert told["overwrite"] == [15] * 4
    assert told["metadata"] == [{"by": 10}] * 4
    assert aiockpt.blocking.load(tmp_path / "run", step=15)["progress"] == {"epoch": 4}


def test_ranks_that_come_late_or_not(start: Start, tmp_path: Path) -> None:
    """A long evaluation is no error; not to come at all is one, in time; and nothing is lost by it."""
    job = start(
        4,
        SMALL
        + """
    import time
    with checkpointer(args[0], stall_timeout=1, arrival_timeout=5) as ckpt:
        ckpt.save(0, state).result()
        if rank == 3:
            evaluate(2.5)  # longer than the stall_timeout
        save, seconds = seconds_of(lambda: ckpt.save(1, state))
        say("blocked", seconds)
        say("late", of(save.result))
        dist.barrier()

        if rank != 3:
            say("missing", seconds_of(ckpt.save(2, state).result))
        dist.barrier()
        if rank == 3:  # whoever comes then hears of it
            say("missing", seconds_of(ckpt.save(2, state).result))
        say("after", of(ckpt.save(3, state).result))
    """,
        tmp_path / "run",
    )
    job.check()
    told = job.told()
    assert told["late"] == [1] * 4
    assert all(seconds < 1.5 for seconds in told["blocked"]), told["blocked"]
    for one, seconds in told["missing"]:
        assert one["error"] == "PeerFailedError", one
        assert one["rank"] == 3, one
        assert "did not call save(2) within 5 s" in one["text"], one
        assert seconds < 15
    assert told["after"] == [3] * 4


def test_a_call_more_on_one_rank(start: Start, tmp_path: Path) -> None:
    """Calls are numbered, so one that the others did not make is found at the next; what stands, stands."""
    job = start(
        2,
        SMALL
        + """
    with checkpointer(args[0]) as ckpt:
        ckpt.save(0, state).result()
        if rank == 1:
            extra = ckpt.save(1, state)
            say("extra", of(extra.result))
        else:
            say("next", of(ckpt.save(2, state).result))
        say("steps", ckpt.steps())
    """,
        tmp_path / "run",
    )
    job.check()
    told = job.told()
    for one in (told["extra"][1], told["next"][0]):
        assert one["error"] == "PlanMismatchError"
        assert "called it more often" in one["text"]
    assert told["steps"] == [[0], [0]]


def test_collectives_of_the_training(start: Start, tmp_path: Path) -> None:
    """None of ours ever runs on the training's group, so none interleaves with its own while saves are under way."""
    job = start(
        4,
        SMALL
        + """
    from torch.distributed import distributed_c10d
    group = distributed_c10d._get_default_group()
    before = group._get_sequence_number_for_group()
    collectives = 0
    saves = []
    x = torch.zeros(1000)
    with checkpointer(args[0]) as ckpt:
        for step in range(120):
            x.fill_(rank + step)
            dist.all_reduce(x)
            assert x[0] == 4 * step + 6 and x[-1] == x[0], (step, x)
            if step % 40 == rank:  # the ranks save at different moments of their collectives
                saves.append(ckpt.save(step // 40, state))
            dist.barrier()
            collectives += 2
        say("saves", [of(save.result) for save in saves])
        say("due", ckpt.due(1))
    say("collectives", group._get_sequence_number_for_group() - before - collectives)
    """,
        tmp_path / "run",
    )
    job.check()
    told = job.told()
    assert told["saves"] == [[0, 1, 2]] * 4
    assert told["collectives"] == [0] * 4
