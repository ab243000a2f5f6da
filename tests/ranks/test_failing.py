"""Workers, trainers and disks that fail on one rank: one outcome on all, named, and training goes on."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

import aiockpt
from tests.ranks.conftest import Start
from tests.ranks.scripts import SMALL, errors
from tests.support import attempts

pytestmark = pytest.mark.process

PROMPT_SECONDS = 5.0
"""For what is promised within 1 s on a machine that has nothing else to do; the time-outs of these jobs are 60 s."""


def test_workers_that_are_killed(start: Start, tmp_path: Path) -> None:
    """Another one comes, all ranks write again from what they staged; who dies twice on a save fails it everywhere."""
    run = tmp_path / "run"
    job = start(
        4,
        SMALL
        + """
    with checkpointer(
        args[0],
        *([rule("worker.file_sync", "kill", path="deadly/*")] if rank == 1 else []),
    ) as ckpt:
        ckpt.save(0, state).result()
        for step, victim in ((1, 2), (2, 0)):
            workers = pids_of(ckpt)
            if rank == victim:
                stop(workers[victim])  # nothing of this rank is written before its death
            dist.barrier()
            save = ckpt.save(step, state)
            save.wait_staged()
            dist.barrier()
            if rank == victim:
                kill(workers[victim])
            say(f"killed {victim}", of(save.result))
        say("restarts", ckpt.statistics().worker_restarts)
        say("twice", of(ckpt.save(3, {"deadly": own(rank)}).result))
        say("restarts then", ckpt.statistics().worker_restarts)
        say("after", of(ckpt.save(4, state).result))
    """,
        run,
    )
    job.check()
    told = job.told()
    assert told["killed 2"] == [1] * 4
    assert told["killed 0"] == [2] * 4
    assert told["restarts"] == [1, 0, 1, 0]
    assert errors(told["twice"]) == ["PeerFailedError", "WorkerExitedError", "PeerFailedError", "PeerFailedError"]
    assert all(one["rank"] == 1 and "rank 1" in one["text"] for i, one in enumerate(told["twice"]) if i != 1)
    assert "2 workers died on it" in told["twice"][1]["text"]
    assert told["restarts then"] == [1, 2, 1, 0]
    assert told["after"] == [4] * 4
    assert sorted(aiockpt.blocking.steps(run)) == [0, 1, 2, 4]
    assert attempts(run) == []


def test_a_rank_without_a_worker(start: Start, tmp_path: Path) -> None:
    """It says so before it goes: the next save fails on the others at once, by name, and so does each later one."""
    job = start(
        4,
        SMALL
        + """
    policy = aiockpt.RestartPolicy(tries=0)
    with checkpointer(args[0], restart=policy if rank == 2 else aiockpt.RestartPolicy()) as ckpt:
        ckpt.save(0, state).result()
        if rank == 2:
            kill(worker_of(ckpt))
            say("first", seconds_of(lambda: ckpt.save(1, state).result()))
        dist.barrier()
        if rank != 2:
            say("first", seconds_of(lambda: ckpt.save(1, state).result()))
        say("second", seconds_of(lambda: ckpt.save(2, state).result()))
        say("steps", of(ckpt.steps))
        dist.barrier()
    """,
        tmp_path / "run",
    )
    job.check()
    told = job.told()
    for name in ("first", "second"):
        outcomes = [one for one, _ in told[name]]
        assert errors(outcomes) == ["PeerFailedError", "PeerFailedError", "RestartLimitError", "PeerFailedError"]
        assert all(one["rank"] == 2 for i, one in enumerate(outcomes) if i != 2)
        assert all("rank 2" in one["text"] and "died" in one["text"] for one in outcomes if "rank" in one), outcomes
        assert all(seconds < PROMPT_SECONDS for _, seconds in told[name]), told[name]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_worker_that_stands_still(victim: int, start: Start, tmp_path: Path) -> None:
    """It is replaced after ``stall_timeout``, its rank is named in the log, and the save is made again."""
    job = start(
        4,
        SMALL
        + """
    import logging
    logging.basicConfig(level=logging.INFO)
    victim = args[1]
    with checkpointer(args[0], stall_timeout=2) as ckpt:
        ckpt.save(0, state).result()
        if rank == victim:
            stop(worker_of(ckpt))
        dist.barrier()
        say("save", seconds_of(ckpt.save(1, state).result))
        say("restarts", ckpt.statistics().worker_restarts)
    """,
        tmp_path / "run",
        victim,
    )
    job.check()
    told = job.told()
    assert [outcome for outcome, _ in told["save"]] == [1] * 4
    assert all(1 < seconds < 2 + 10 for _, seconds in told["save"]), told["save"]
    assert told["restarts"][victim] >= 1
    assert "stalled and was killed" in job.err(victim)
    if victim:
        assert f"the worker of rank {victim} is away" in job.err(0)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_trainer_that_dies_before_it_is_staged(victim: int, start: Start, tmp_path: Path) -> None:
    """Its save fails everywhere, and so does each later one; training goes on."""
    run = tmp_path / "run"
    job = start(
        4,
        SMALL
        + """
    victim = args[1]
    others = dist.new_group([other for other in range(world) if other != victim])
    dying = (rule("trainer.begin_sent", "kill", nth=2),) if rank == victim else ()
    ckpt = checkpointer(args[0], trainer_faults=dying)
    ckpt.open()
    ckpt.save(0, state).result()
    dist.barrier()
    save = ckpt.save(1, state)
    say("save", seconds_of(save.result))
    say("later", seconds_of(lambda: ckpt.save(2, state).result()))
    dist.barrier(others)  # else who comes last hears that rank 0 has left
    say("close", seconds_of(ckpt.close))
    end()
    """,
        run,
        victim,
    )
    statuses = job.wait()
    assert statuses == [-9 if rank == victim else 0 for rank in range(4)], job.report()
    for name, outcomes in job.told().items():
        for rank, told in enumerate(outcomes):
            if rank == victim:
                continue
            outcome, seconds = told
            assert seconds < PROMPT_SECONDS, (name, told)
            if name != "close":
                assert outcome["error"] == "PeerFailedError", (name, outcome)
                assert outcome["rank"] == victim, (name, outcome)
    assert aiockpt.blocking.steps(run) == [0]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_trainer_that_dies_behind_its_staging(victim: int, start: Start, tmp_path: Path) -> None:
    """Its worker finishes the save, for all."""
    run = tmp_path / "run"
    job = start(
        4,
        SMALL
        + """
    import os
    victim = args[1]
    others = dist.new_group([other for other in range(world) if other != victim])
    ckpt = checkpointer(args[0])
    ckpt.open()
    ckpt.save(0, state).result()
    dist.barrier()
    save = ckpt.save(1, state)
    if rank == victim:
        save.wait_staged()
        kill(os.getpid())
    say("save", of(save.result))
    say("later", of(lambda: ckpt.save(2, state).result()))
    dist.barrier(others)  # else who comes last hears that rank 0 has left
    ckpt.close()
    end()
    """,
        run,
        victim,
    )
    statuses = job.wait()
    assert statuses == [-9 if rank == victim else 0 for rank in range(4)], job.report()
    told = job.told()
    others = [rank for rank in range(4) if rank != victim]
    assert [told["save"][rank] for rank in others] == [1] * 3
    assert errors([told["later"][rank] for rank in others]) == ["PeerFailedError"] * 3
    assert all(told["later"][rank]["rank"] == victim for rank in others)
    assert sorted(aiockpt.blocking.steps(run)) == [0, 1]


def test_errors_of_one_rank(start: Start, tmp_path: Path) -> None:
    """A full disk, a file that was torn, a state that was written to: told by name, and the next save works."""
    job = start(
        4,
        SMALL
        + """
    import errno
    faults = {
        1: [rule("worker.preallocate", "errno", errno=errno.ENOSPC, path="full/*", nth=0)],
        0: [rule("worker.manifest_write", "torn", errno=errno.EIO, nth=3)],
    }
    def train():
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * 0.5
        optimizer.step()
    torch.manual_seed(rank)
    model = torch.nn.Linear(1024, 1024)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guarded = {"mine": aiockpt.PerRank({"model": model, "optimizer": optimizer})}
    with checkpointer(args[0], *faults.get(rank, [])) as ckpt:
        train()
        say("before", of(ckpt.save(0, guarded).result))
        say("full", of(ckpt.save(1, {"full": own(rank)}).result))
        say("between", of(ckpt.save(2, state).result))
        say("torn manifest", of(ckpt.save(3, state).result))
        train()
        import threading
        gate = threading.Event()
        if rank == 3:
            ckpt._coordinator._stager._thread.post(lambda: gate.wait(60))
        save = ckpt.save(4, guarded)
        if rank == 3:
            model.weight.data.zero_()
            gate.set()
        say("torn", of(save.result))
        say("after", of(ckpt.save(5, state).result))
        if rank == 0:
            say("steps", sorted(ckpt.steps()))
    """,
        tmp_path / "run",
    )
    job.check()
    told = job.told()
    assert told["before"] == [0] * 4
    assert errors(told["full"]) == ["PeerFailedError", "StorageError", "PeerFailedError", "PeerFailedError"]
    assert told["full"][1]["errno"] == errno.ENOSPC
    for rank in (0, 2, 3):
        one = told["full"][rank]
        assert (one["rank"], one["phase"], one["cause"]) == (1, "write", "StorageError"), one
        assert "No space left" in one["text"], one
    assert told["between"] == [2] * 4
    assert errors(told["torn manifest"]) == ["StorageError"] + ["PeerFailedError"] * 3, told["torn manifest"]
    assert all(one["rank"] == 0 for one in told["torn manifest"][1:])
    assert errors(told["torn"]) == ["PeerFailedError"] * 3 + ["TornSnapshotError"]
    for one in told["torn"][:3]:
        assert (one["rank"], one["phase"]) == (3, "stage"), one
        assert "mine.model.weight" in one["text"], one
    assert told["after"] == [5] * 4
    assert told["steps"][0] == [0, 2, 5]


def test_rank_0_closes_early(start: Start, tmp_path: Path) -> None:
    """The others are told at once that it has left, and why that ends their saving."""
    job = start(
        3,
        SMALL
        + """
    with checkpointer(args[0]) as ckpt:
        ckpt.save(0, state).result()
        if rank == 0:
            ckpt.close()
        dist.barrier()
        if rank:
            say("save", seconds_of(lambda: ckpt.save(1, state).result()))
            say("prepare", of(lambda: ckpt.prepare(state)))
            say("restore", seconds_of(lambda: ckpt.restore(state)))
        dist.barrier()
    """,
        tmp_path / "run",
    )
    job.check()
    told = job.told()
    for name in ("save", "restore"):
        for outcome, seconds in told[name][1:]:
            assert outcome["error"] == "PeerFailedError", (name, outcome)
            assert outcome["rank"] == 0
            assert "rank 0 has left" in outcome["text"]
            assert seconds < PROMPT_SECONDS
    assert errors(told["prepare"][1:]) == ["PeerFailedError"] * 2


def test_a_hub_that_is_gone(start: Start, tmp_path: Path) -> None:
    """With rank 0's host nothing is saved any more; each save says so in time, and training goes on."""
    job = start(
        3,
        SMALL
        + """
    import os
    ckpt = checkpointer(args[0], start_timeout=5)
    ckpt.open()
    ckpt.save(0, state).result()
    workers = pids_of(ckpt)
    if rank == 0:
        stop(workers[0])
    dist.barrier()
    save = ckpt.save(1, state)
    save.wait_staged()
    dist.barrier()
    if rank == 0:
        kill(workers[0])
        kill(os.getpid())
    say("open", seconds_of(save.result))
    say("next", seconds_of(lambda: ckpt.save(2, state).result()))
    say("due", ckpt.due(3))
    say("close", seconds_of(ckpt.close))
    end()
    """,
        tmp_path / "run",
    )
    statuses = job.wait()
    assert statuses == [-9, 0, 0], job.report()
    told = job.told()
    for name in ("open", "next"):
        for outcome, seconds in told[name][1:]:
            assert outcome["error"] == "PeerFailedError", (name, outcome)
            assert outcome["rank"] == 0
            assert "was not reached" in outcome["text"]
            assert seconds < 5 + PROMPT_SECONDS
    assert all(seconds < PROMPT_SECONDS for _, seconds in told["close"][1:])
