"""Closing while the worker does not answer: what is told is what the disk says, once the worker is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import aiockpt
from aiockpt import blocking
from aiockpt.coordinator import coordinator, saves
from aiockpt.storage.faults import FaultPoint
from aiockpt.testing.faults import WORKER_ARGUMENT, ArmedFaults, FaultPlan, FaultRule
from tests.support import attempts, is_alive, wait_until

pytestmark = pytest.mark.process

STATE: dict[str, Any] = {"x": torch.arange(1000)}


def stalled_at(point: FaultPoint, run: Path, monkeypatch: pytest.MonkeyPatch) -> blocking.Checkpointer:
    """Return an open Checkpointer whose worker stops there, and whose close does not wait long for it."""
    monkeypatch.setattr(coordinator, "ABANDON_SECONDS", 0.2)
    plan = FaultPlan(rules=[FaultRule(point=point, action="stall")])
    ckpt = blocking.Checkpointer(run, close_timeout=0.5)
    ckpt._coordinator.worker_faults = (WORKER_ARGUMENT, plan.to_json())
    ckpt.open()
    ckpt.prepare(STATE)
    return ckpt


@pytest.mark.parametrize("drain", [True, False])
def test_a_worker_that_stopped_behind_the_rename(drain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint stands, so it is never told as abandoned, although the worker said nothing of it."""
    ckpt = stalled_at(FaultPoint.WORKER_AFTER_RENAME, tmp_path, monkeypatch)
    pid = ckpt.statistics().worker_pid
    save = ckpt.save(0, STATE)
    save.wait_staged()
    if not drain:  # else it may be cancelled before the rename
        wait_until(lambda: (tmp_path / "step-0").exists(), "the rename")
    ckpt.close(drain=drain)
    assert save.result(0).step == 0
    assert pid is not None
    assert not is_alive(pid)
    assert blocking.steps(tmp_path) == [0]


def test_a_worker_that_stopped_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told as abandoned or unknown; its attempt is moved away, so that no late rename finds it."""
    ckpt = stalled_at(FaultPoint.WORKER_BEFORE_RENAME, tmp_path, monkeypatch)
    save = ckpt.save(0, STATE)
    with pytest.raises((aiockpt.SaveCancelledError, aiockpt.CommitUnknownError), match="close_timeout"):
        ckpt.close()
    assert save.done()
    assert blocking.steps(tmp_path) == attempts(tmp_path) == []


def test_a_disk_that_does_not_answer_at_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can say what it has, and close waits for it no longer than its bound."""
    monkeypatch.setattr(saves, "LOOK_SECONDS", 0.2)
    ckpt = stalled_at(FaultPoint.WORKER_BLOCK_WRITE, tmp_path, monkeypatch)
    hang = FaultRule(point=FaultPoint.TRAINER_BEFORE_FENCE, action="delay", seconds=1.5)
    ckpt._coordinator._opened.saves._faults = ArmedFaults(FaultPlan(rules=[hang]))
    save = ckpt.save(0, STATE)
    with pytest.raises(aiockpt.CommitUnknownError, match="close_timeout"):
        ckpt.close()
    assert save.phase != "committed"
