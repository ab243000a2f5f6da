"""Branches: going back to an older checkpoint, and on from there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import aiockpt
from aiockpt import blocking

pytestmark = pytest.mark.process


def saved(ckpt: blocking.Checkpointer, step: int, value: int) -> None:
    ckpt.save(step, {"n": value}).result(60)


def test_steps_behind_the_restored_one_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An abandoned branch needs no ``overwrite``; one warning names it; the newest is what was saved last."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        for step in (10, 20, 30):
            saved(ckpt, step, step)
    state: dict[str, Any] = {"n": 0}
    with blocking.Checkpointer(tmp_path) as ckpt:
        restored = ckpt.restore(state, step=10)
        assert restored is not None
        assert state["n"] == 10
        warnings = [record for record in caplog.records if "20, 30" in record.getMessage()]
        assert warnings
        saved(ckpt, 20, 21)
        with pytest.raises(aiockpt.StepExistsError):
            ckpt.save(20, {"n": 22})
        with pytest.raises(aiockpt.StepExistsError):
            ckpt.save(10, {"n": 11})
        assert ckpt.latest() == 20
    with blocking.Checkpointer(tmp_path) as ckpt:
        newest = ckpt.restore(state)
        assert newest is not None
        assert (newest.step, state["n"]) == (20, 21)


def test_newest_is_by_ordinal_not_by_step(tmp_path: Path) -> None:
    """Going back and saving a lower step makes that the newest, also for the next job and for readers."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        saved(ckpt, 100, 1)
        saved(ckpt, 50, 2)
        assert ckpt.latest() == 50
    assert blocking.load(tmp_path) == {"n": 2}
    with blocking.Checkpointer(tmp_path) as ckpt:
        saved(ckpt, 7, 3)
    assert blocking.load(tmp_path) == {"n": 3}
    assert blocking.steps(tmp_path) == [7, 50, 100]


def test_retention_spares_the_restored_one_until_a_later_one_is_committed(tmp_path: Path) -> None:
    """After going back with ``Latest(1)`` the restored checkpoint goes only once its successor stands."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        for step in (1, 2):
            saved(ckpt, step, step)
    with blocking.Checkpointer(tmp_path, keep=aiockpt.Latest(1)) as ckpt:
        ckpt.restore({"n": 0}, step=1)
        assert ckpt.steps() == [1, 2]
        saved(ckpt, 3, 3)
        assert ckpt.steps() == [3]
    assert not [name for name in os.listdir(tmp_path) if name.startswith((".trash", ".step", ".old"))]


def test_each_opening_has_a_higher_term(tmp_path: Path) -> None:
    """And lower claims are removed."""
    for turn in range(3):
        with blocking.Checkpointer(tmp_path) as ckpt:
            saved(ckpt, turn, turn)
        assert [name for name in os.listdir(tmp_path) if name.startswith(".term-")] == [f".term-{turn + 1}"]
