"""Trainers that are stopped, whose workers live: an error on all ranks in time, unless all was staged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import aiockpt
from tests.ranks.conftest import Start
from tests.ranks.scripts import SMALL

pytestmark = pytest.mark.process

STALL_SECONDS = 2.0
LATEST_SECONDS = STALL_SECONDS + 15.0
"""``arrival_timeout`` is 600 s in these jobs."""

COMMON = (
    SMALL
    + f"""
    victim = args[1]
    trainers = pids_of_trainers()
    waker = min({{0, 1}} - {{victim}})
    options = {{"stall_timeout": {STALL_SECONDS}}}

    def wake_victim():
        if rank == waker:
            wake(trainers[victim])
"""
)


def check_named(told: list[Any], victim: int, phase: str) -> None:
    """Fail unless every rank was told, and the others in time, which rank was stopped in which phase."""
    for rank, (outcome, seconds) in enumerate(told):
        assert outcome["error"] == "PeerFailedError", (rank, outcome)
        assert (outcome["rank"], outcome["phase"]) == (victim, phase), (rank, outcome)
        assert f"the trainer of rank {victim} has not been heard for {STALL_SECONDS:g} s" in outcome["text"], outcome
        if rank != victim:
            assert seconds < LATEST_SECONDS, (rank, seconds)


@pytest.mark.parametrize("victim", [0, 2])
def test_before_it_calls(victim: int, start: Start, tmp_path: Path) -> None:
    """The save that it has not called fails on all ranks, and so do those that begin meanwhile; the next one works."""
    run = tmp_path / "run"
    job = start(
        4,
        COMMON
        + """
    with checkpointer(args[0], **options) as ckpt:
        ckpt.save(0, state).result()
        dist.barrier()
        if rank == victim:
            stop_here()
        say("save", seconds_of(lambda: ckpt.save(1, state).result()))
        say("again", seconds_of(lambda: ckpt.save(2, state).result()))
        wake_victim()
        dist.barrier()
        say("after", of(ckpt.save(3, state).result))
        say("restarts", ckpt.statistics().worker_restarts)
    """,
        run,
        victim,
    )
    job.check()
    told = job.told()
    check_named(told["save"], victim, "save")
    check_named(told["again"], victim, "save")
    others = [seconds for rank, (_, seconds) in enumerate(told["save"]) if rank != victim]
    assert all(seconds > STALL_SECONDS / 2 for seconds in others), others
    assert "behind the save of step 0" in told["save"][1][0]["text"]
    assert told["after"] == [3] * 4
    assert told["restarts"] == [0] * 4
    assert sorted(aiockpt.blocking.steps(run)) == [0, 3]


@pytest.mark.parametrize("victim", [0, 2])
def test_while_it_copies(victim: int, start: Start, tmp_path: Path) -> None:
    """The save fails on all ranks, on its own once it is awake, and the next one works."""
    run = tmp_path / "run"
    job = start(
        4,
        COMMON
        + """
    held = (rule("trainer.copied", "delay", seconds=5, nth=2),) if rank == victim else ()
    with checkpointer(args[0], trainer_faults=held, **options) as ckpt:
        ckpt.save(0, state).result()
        dist.barrier()
        save = ckpt.save(1, state)
        if rank == victim:
            wait_until(lambda: save._record.begin.call.opened, "the hub's answer")
            stop_here()
        say("save", seconds_of(save.result))
        wake_victim()
        dist.barrier()
        say("after", of(ckpt.save(2, state).result))
    """,
        run,
        victim,
    )
    job.check()
    told = job.told()
    check_named(told["save"], victim, "stage")
    assert "while it copied the state of step 1" in told["save"][1][0]["text"]
    assert told["after"] == [2] * 4
    assert sorted(aiockpt.blocking.steps(run)) == [0, 2]


@pytest.mark.parametrize("victim", [0, 2])
def test_behind_its_staging(victim: int, start: Start, tmp_path: Path) -> None:
    """The workers finish the save, however long it is silent; the one after it fails."""
    run = tmp_path / "run"
    job = start(
        4,
        COMMON
        + """
    held = (rule("worker.file_sync", "delay", seconds=6, path="own/*", nth=2),) if rank == victim else ()
    with checkpointer(args[0], *held, **options) as ckpt:
        ckpt.save(0, state).result()
        dist.barrier()
        save = ckpt.save(1, state)
        if rank == victim:
            save.wait_staged()
            stop_here()
        say("save", seconds_of(save.result))
        say("later", seconds_of(lambda: ckpt.save(2, state).result()))
        wake_victim()
        dist.barrier()
        say("after", of(ckpt.save(3, state).result))
    """,
        run,
        victim,
    )
    job.check()
    told = job.told()
    assert [outcome for outcome, _ in told["save"]] == [1] * 4
    assert told["save"][1][1] > 2 * STALL_SECONDS, told["save"]
    check_named(told["later"], victim, "save")
    assert told["after"] == [3] * 4
    assert sorted(aiockpt.blocking.steps(run)) == [0, 1, 3]


def test_a_late_rank_is_not_taken_for_a_stopped_one(start: Start, tmp_path: Path) -> None:
    """It computes, or sleeps, for longer than ``stall_timeout``, and its process runs."""
    job = start(
        3,
        COMMON
        + """
    import time
    with checkpointer(args[0], **options) as ckpt:
        ckpt.save(0, state).result()
        until = time.monotonic() + 2.5 * options["stall_timeout"]
        if rank == 1:
            evaluate(2.5 * options["stall_timeout"])
        x = torch.ones(300, 300)
        while rank == 2 and time.monotonic() < until:
            x = (x @ x).clamp(0, 1)
            sum(range(100_000))  # what holds Python's lock by turns
        say("save", of(ckpt.save(1, state).result))
    """,
        tmp_path / "run",
        2,
    )
    job.check()
    assert job.told()["save"] == [1] * 3


def test_in_a_restore(start: Start, tmp_path: Path) -> None:
    """Ranks that wait for a stopped one there are told as well, and restore together afterwards."""
    job = start(
        3,
        COMMON
        + """
    with checkpointer(args[0], **options) as ckpt:
        ckpt.save(0, state).result()
        dist.barrier()
        if rank == victim:
            stop_here()
        say("restore", seconds_of(lambda: ckpt.restore(state)))
        wake_victim()
        dist.barrier()
        say("after", of(lambda: ckpt.restore(state)))
    """,
        tmp_path / "run",
        2,
    )
    job.check()
    told = job.told()
    for rank, (outcome, seconds) in enumerate(told["restore"]):
        assert outcome["error"] == "PeerFailedError", (rank, outcome)
        assert outcome["rank"] == 2, (rank, outcome)
        assert "has not been heard" in outcome["text"], (rank, outcome)
        assert rank == 2 or seconds < LATEST_SECONDS, (rank, seconds)
    assert told["after"] == [0] * 3
