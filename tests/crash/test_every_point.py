"""At every named point: kill the worker, kill the trainer, raise an errno, tear a write. Whole or absent, always."""

from __future__ import annotations

import errno
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import aiockpt
from aiockpt import blocking
from aiockpt.storage.faults import FaultPoint
from aiockpt.testing.faults import WORKER_ARGUMENT, FaultPlan, FaultRule
from tests.crash.points import OF_RANKS, OF_TRAINER, OF_WORKER, STARTING
from tests.support import attempts, is_alive, start_script, wait_until

pytestmark = [pytest.mark.process, pytest.mark.crash]

REPLACING = {FaultPoint.WORKER_OLD_ASIDE, FaultPoint.WORKER_PRUNE, FaultPoint.WORKER_REMOVE}
"""Passed only where something is replaced or removed."""
UNKNOWN = {FaultPoint.WORKER_AFTER_RENAME, FaultPoint.WORKER_RUN_SYNCED}
COMMITTED = {FaultPoint.WORKER_BEFORE_REPORT, FaultPoint.WORKER_PRUNE, FaultPoint.WORKER_REMOVE}
"""What an errno means there; anywhere else the save has failed."""

# Walked, so that a new point is tested by existing. WORKER_TORN is passed only behind a torn write, see below; what is
# passed before a save begins is in coordinator.test_bad_workers and worker.test_crashes, several ranks in test_ranks.
SAVE_POINTS = [point for point in OF_WORKER if point not in STARTING | OF_RANKS | {FaultPoint.WORKER_TORN}]
TRAINER_POINTS = [point for point in OF_TRAINER if point not in OF_RANKS]

OLD: dict[str, Any] = {"x": torch.zeros(5000), "y": {"z": torch.zeros(9)}, "n": 0}
NEW: dict[str, Any] = {"x": torch.ones(5000), "y": {"z": torch.ones(9)}, "n": 1}


@pytest.fixture(scope="module")
def _old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has the old state as steps 0 and 1, made once."""
    run = tmp_path_factory.mktemp("old") / "run"
    with blocking.Checkpointer(run) as ckpt:
        for step in range(2):
            ckpt.save(step, OLD).result(60)
    return run


@pytest.fixture
def run(_old: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(_old, tmp_path / "run"))


def rule(point: FaultPoint, action: Any, **more: Any) -> FaultPlan:
    return FaultPlan(rules=[FaultRule(point=point, action=action, **more)])


def open_with(run: Path, plan: FaultPlan, **options: Any) -> blocking.Checkpointer:
    """Open a run whose first worker meets the plan; those after it do not."""
    ckpt = blocking.Checkpointer(run, **options)
    ckpt._coordinator.worker_faults = (WORKER_ARGUMENT, plan.to_json())
    ckpt.open()
    ckpt._coordinator._supervisor.faults = None
    return ckpt


def value_of(run: Path, step: int) -> int:
    """Return which of the two states a step holds, after reading and verifying all of it."""
    loaded = blocking.load(run, step=step)
    assert loaded["x"].unique().tolist() == loaded["y"]["z"].unique().tolist() == [float(loaded["n"])]
    return int(loaded["n"])


def assert_tidy(run: Path, steps: list[int]) -> None:
    """The run holds exactly these steps, and the next job finds it in order."""
    assert blocking.steps(run) == steps
    with blocking.Checkpointer(run) as ckpt:
        ckpt.save(99, NEW).result(60)
    assert not [name for name in attempts(run) if not name.startswith("step-")]
    assert not [path.name for path in run.iterdir() if path.name.startswith((".old.", ".trash."))]
    assert blocking.steps(run) == [*steps, 99]


@pytest.mark.parametrize("point", [point for point in SAVE_POINTS if point not in REPLACING])
def test_worker_killed(point: FaultPoint, run: Path) -> None:
    """The save is retried from the arena and commits; the checkpoints before it were never in danger."""
    with closing(open_with(run, rule(point, "kill"))) as ckpt:
        assert ckpt.save(2, NEW).result(60).step == 2
        assert ckpt.statistics().worker_restarts == 1, "the point was not passed"
        assert [value_of(run, step) for step in range(3)] == [0, 0, 1]
    assert_tidy(run, [0, 1, 2])


@pytest.mark.parametrize("point", SAVE_POINTS)
def test_worker_killed_while_it_replaces_and_removes(point: FaultPoint, run: Path) -> None:
    """The same with an overwrite, and with retention, which may be behind by one checkpoint then."""
    with closing(open_with(run, rule(point, "kill"), keep=aiockpt.Latest(1))) as ckpt:
        assert ckpt.save(1, NEW, overwrite=True).result(60).step == 1
        wait_until(lambda: ckpt.statistics().worker_restarts == 1, "the point to be passed")
        assert value_of(run, 1) == 1
        steps = ckpt.steps()
        assert steps in ([0, 1], [1])
        if 0 in steps:
            assert value_of(run, 0) == 0
    assert_tidy(run, steps)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("point", SAVE_POINTS)
def test_an_errno_fails_that_save_alone(point: FaultPoint, code: int, run: Path) -> None:
    """A ``StorageError`` with the errno, what it was to replace stands; or a commit, or an outcome that is unknown."""
    with closing(open_with(run, rule(point, "errno", errno=code), keep=aiockpt.Latest(1))) as ckpt:
        save = ckpt.save(1, NEW, overwrite=True)
        if point in COMMITTED:
            save.result(60)
        else:
            kind = aiockpt.CommitUnknownError if point in UNKNOWN else aiockpt.StorageError
            with pytest.raises(kind) as caught:
                save.result(60)
            assert type(caught.value) is kind
            assert caught.value.step == 1
            assert "\nwhy: " in str(caught.value)
            assert "\nnext: " in str(caught.value)
            assert point in UNKNOWN or caught.value.errno == code  # type: ignore[attr-defined]
        assert value_of(run, 1) == (point in UNKNOWN | COMMITTED)
        assert ckpt.statistics().worker_restarts == 0
        ckpt.save(2, NEW).result(60)
        assert value_of(run, 2) == 1
    assert attempts(run) == []


@pytest.mark.parametrize("code", [0, errno.EIO])
@pytest.mark.parametrize("point", [FaultPoint.WORKER_BLOCK_WRITE, FaultPoint.WORKER_MANIFEST_WRITE])
def test_a_torn_write(point: FaultPoint, code: int, run: Path) -> None:
    """Half of it, then death or an errno: nothing of the old try is used again."""
    with closing(open_with(run, rule(point, "torn", errno=code))) as ckpt:
        save = ckpt.save(2, NEW)
        if code:
            with pytest.raises(aiockpt.StorageError):
                save.result(60)
        else:
            save.result(60)
        assert ckpt.statistics().worker_restarts == (not code)
    assert_tidy(run, [0, 1] if code else [0, 1, 2])
    if not code:
        assert value_of(run, 2) == 1


SAVING = """
    ckpt = aiockpt.blocking.Checkpointer(run)
    ckpt._coordinator.faults = faults
    if worker_faults:
        ckpt._coordinator.worker_faults = (WORKER_ARGUMENT, worker_faults)
    ckpt.open()
    say(ckpt.statistics().worker_pid)
    ckpt.save(2, NEW).result(60)
"""
RESTORING = """
    from aiockpt.restoring.run import restore_run
    from aiockpt.restoring.targets import read_targets
    say(0)
    restore_run(run, read_targets(OLD, None, None), faults=faults)
"""
VERIFYING = """
    from aiockpt.storage.verify import verify_checkpoint
    say(0)
    verify_checkpoint(f"{run}/step-1", faults=faults)
"""
TRAINER = """
    import os, sys, torch, aiockpt
    from aiockpt.testing.faults import WORKER_ARGUMENT, from_json
    from tests.crash.test_every_point import NEW, OLD
    run, worker_faults, faults = sys.argv[1], sys.argv[3], from_json(sys.argv[2])
    def say(pid):
        print(pid, flush=True)
"""
DOING = {
    FaultPoint.TRAINER_BEGIN_SENT: SAVING,
    FaultPoint.TRAINER_COPIED: SAVING,
    FaultPoint.TRAINER_STAGED_SENT: SAVING,
    FaultPoint.TRAINER_BEFORE_FENCE: SAVING,
    FaultPoint.TRAINER_TAKING_RUN: SAVING,
    FaultPoint.TRAINER_RESTORING: RESTORING,
    FaultPoint.TRAINER_READ: VERIFYING,
}


@pytest.mark.parametrize("point", TRAINER_POINTS)
def test_trainer_killed(point: FaultPoint, run: Path) -> None:
    """A fully staged save is committed by the worker, a half-staged one is removed; the worker ends."""
    is_fencing = point is FaultPoint.TRAINER_BEFORE_FENCE  # passed when a worker has died
    worker_faults = rule(FaultPoint.WORKER_FILE_SYNC, "kill").to_json() if is_fencing else ""
    trainer = start_script(
        TRAINER + DOING[point] + "    say('survived')\n", run, rule(point, "kill").to_json(), worker_faults
    )
    out, err = trainer.communicate(timeout=60)
    assert trainer.returncode == -9, out + err
    pids = [int(line) for line in out.split()]
    wait_until(lambda: not any(is_alive(pid) for pid in pids if pid), "the worker's end")
    steps = blocking.steps(run)
    allowed = ([0, 1, 2],) if point is FaultPoint.TRAINER_STAGED_SENT else ([0, 1],)
    if point in (FaultPoint.TRAINER_COPIED, FaultPoint.TRAINER_STAGED_SENT):
        allowed = ([0, 1], [0, 1, 2])  # the end of staging may lie in the socket, or wait in the trainer
    assert steps in allowed
    assert [value_of(run, step) for step in steps] == [0, 0, 1][: len(steps)]
    assert_tidy(run, steps)
