"""At every named point: kill the worker, kill the trainer, raise an errno, tear a write. Whole or absent, always."""

from __future__ import annotations

import errno
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import aiockpt
from aiockpt import blocking
from aiockpt.storage.faults import FaultPoint
from aiockpt.testing.faults import WORKER_ARGUMENT, FaultPlan, FaultRule
from tests.support import attempts, is_alive, start_script, wait_until

pytestmark = [pytest.mark.process, pytest.mark.crash]

WORKER_POINTS = [point for point in FaultPoint if point.startswith("worker.")]
SAVE_POINTS = [
    point
    for point in WORKER_POINTS
    if point not in (FaultPoint.WORKER_STARTED, FaultPoint.WORKER_ALLOCATING, FaultPoint.WORKER_RESERVED)
]
OLD: dict[str, Any] = {"x": torch.zeros(5000), "y": {"z": torch.zeros(9)}, "n": 0}
NEW: dict[str, Any] = {"x": torch.ones(5000), "y": {"z": torch.ones(9)}, "n": 1}


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
    assert attempts(run) == []
    assert blocking.steps(run) == [*steps, 99]


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("point", SAVE_POINTS)
def test_worker_killed(point: FaultPoint, overwrite: bool, tmp_path: Path) -> None:
    """The save is retried from the arena and commits; the checkpoint before it was never in danger."""
    plan = FaultPlan(rules=[FaultRule(point=point, action="kill")])
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.save(0, OLD).result(60)
        if overwrite:
            ckpt.save(1, OLD).result(60)
    with closing(open_with(tmp_path, plan, keep=aiockpt.Latest(2))) as ckpt:
        assert ckpt.save(1, NEW, overwrite=overwrite).result(60).step == 1
        assert (value_of(tmp_path, 0), value_of(tmp_path, 1)) == (0, 1)
    assert_tidy(tmp_path, [0, 1])


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("point", [point for point in SAVE_POINTS if point is not FaultPoint.WORKER_TORN])
def test_an_errno_fails_that_save_alone(point: FaultPoint, code: int, tmp_path: Path) -> None:
    """A ``StorageError`` with the errno, or a commit where the point lies behind it; the next save succeeds."""
    plan = FaultPlan(rules=[FaultRule(point=point, action="errno", errno=code)])
    with closing(open_with(tmp_path, plan, keep=aiockpt.Latest(2))) as ckpt:
        save = ckpt.save(0, OLD)
        try:
            save.result(60)
        except aiockpt.StorageError as exc:
            assert exc.errno == code
            assert exc.step == 0
            assert "next:" in str(exc)
        except aiockpt.CommitUnknownError as exc:
            assert exc.step == 0
        assert ckpt.statistics().worker_restarts == 0
        ckpt.save(1, NEW).result(60)
        assert value_of(tmp_path, 1) == 1
    assert attempts(tmp_path) == []


def test_a_torn_write(tmp_path: Path) -> None:
    """Half a block, then death: nothing of the old try is used again."""
    plan = FaultPlan(rules=[FaultRule(point=FaultPoint.WORKER_BLOCK_WRITE, action="torn")])
    with closing(open_with(tmp_path, plan)) as ckpt:
        ckpt.save(0, NEW).result(60)
        assert ckpt.statistics().worker_restarts == 1
        assert value_of(tmp_path, 0) == 1


TRAINER = """
    import sys, torch
    import aiockpt
    from aiockpt.storage.faults import FaultPoint
    from aiockpt.testing.faults import FaultPlan, FaultRule, from_json
    from tests.crash.test_every_point import NEW, OLD
    run, point = sys.argv[1:3]
    plan = FaultPlan(rules=[FaultRule(point=FaultPoint(point), action="kill")]).to_json()
    with aiockpt.blocking.Checkpointer(run) as ckpt:
        ckpt.save(0, OLD).result(60)
    ckpt = aiockpt.blocking.Checkpointer(run)
    ckpt._coordinator.faults = from_json(plan)
    ckpt.open()
    print(ckpt.statistics().worker_pid, flush=True)
    ckpt.save(1, NEW).result(60)
    print("saved", flush=True)
"""


@pytest.mark.parametrize(
    "point", [FaultPoint.TRAINER_BEGIN_SENT, FaultPoint.TRAINER_COPIED, FaultPoint.TRAINER_STAGED_SENT]
)
def test_trainer_killed(point: FaultPoint, tmp_path: Path) -> None:
    """A fully staged save is committed by the worker, a half-staged one is removed; the worker ends."""
    trainer = start_script(TRAINER, tmp_path, point)
    assert trainer.stdout is not None
    line = trainer.stdout.readline()
    assert line, trainer.communicate()
    out, _ = trainer.communicate(timeout=60)
    assert "saved" not in out
    wait_until(lambda: not is_alive(int(line)), "the worker's end")
    steps = blocking.steps(tmp_path)
    assert steps in ([0], [0, 1])
    assert value_of(tmp_path, 0) == 0
    if 1 in steps:
        assert value_of(tmp_path, 1) == 1
    assert_tidy(tmp_path, steps)
