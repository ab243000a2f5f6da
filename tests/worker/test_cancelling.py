"""Cancel, at every state of a save."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aiockpt.format.image import BLOCK_NBYTES
from aiockpt.protocol.messages import Cancel, Committed, Progress, Staged
from tests.files import names
from tests.worker.driver import Save, check_checkpoint, rule, snapshot, worker

pytestmark = pytest.mark.process


def check_cancelled(child, save: Save, run: Path) -> None:
    error = child.outcome(save)
    assert error.kind == "cancelled"
    assert names(run, ".step-") == []
    follower = Save(snapshot(seed=9), step=save.step, ordinal=2)
    child.commit(follower)
    check_checkpoint(run / f"step-{save.step}", follower)


def test_cancel_at_once(tmp_path: Path) -> None:
    """Nothing was staged."""
    save = Save(snapshot(), step=1)
    with worker(tmp_path / "run") as child:
        child.begin(save)
        child.send(Cancel(save_id=save.save_id))
        check_cancelled(child, save, tmp_path / "run")


def test_cancel_while_blocks_are_written(tmp_path: Path) -> None:
    """Part of the first file is on the disk already."""
    save = Save(snapshot(("model", 2 * BLOCK_NBYTES)), step=1)
    with worker(tmp_path / "run") as child:
        child.begin(save)
        child.fill(save.shot)
        child.send(Staged(save_id=save.save_id, file=0, upto=save.shot.plan.files[0].data_start + BLOCK_NBYTES))
        child.next_where(lambda m: isinstance(m, Progress) and m.written > 0)
        child.send(Cancel(save_id=save.save_id))
        check_cancelled(child, save, tmp_path / "run")


@pytest.mark.parametrize("point", ["worker.block_write", "worker.file_sync"])
def test_cancel_when_staged(tmp_path: Path, point: str) -> None:
    """All is staged, and the disk is slow."""
    save = Save(snapshot(), step=1)
    with worker(tmp_path / "run", faults=rule(point, "delay", seconds=1)) as child:
        child.start_save(save)
        child.next_where(lambda m: isinstance(m, Progress) and m.state == "staged")
        child.send(Cancel(save_id=save.save_id))
        check_cancelled(child, save, tmp_path / "run")


def test_cancel_is_too_late_when_committing(tmp_path: Path) -> None:
    """From COMMITTING on the save is committed, whatever is asked."""
    save = Save(snapshot(), step=1)
    with worker(tmp_path / "run", faults=rule("worker.before_rename", "delay", seconds=0.2)) as child:
        child.start_save(save)
        child.next_where(lambda m: isinstance(m, Progress) and m.state == "committing")
        child.send(Cancel(save_id=save.save_id))
        assert isinstance(child.outcome(save), Committed)
        child.send(Cancel(save_id=save.save_id))  # and after its end it is dropped
        child.commit(Save(snapshot(), step=2, ordinal=2))
    check_checkpoint(tmp_path / "run/step-1", save)


def test_a_cancel_at_any_moment_leaves_all_or_nothing(tmp_path: Path) -> None:
    """Sweeping the moment over a whole save, each outcome fits what stands in the run."""
    run = tmp_path / "run"
    outcomes = set()
    with worker(run) as child:
        for step in range(30):
            save = Save(snapshot(("model", 200_000)), step=step, ordinal=step + 1)
            child.start_save(save)
            for _ in range(step % 4):  # the more of its answers are awaited, the later the cancel comes
                child.next(Progress, Committed)
            child.send(Cancel(save_id=save.save_id))
            outcome = child.outcome(save)
            stands = (run / f"step-{step}").exists()
            assert stands == isinstance(outcome, Committed)
            outcomes.add(stands)
    assert names(run, ".step-") == []
    assert True in outcomes
    assert len(os.listdir(run)) == sum((run / f"step-{step}").exists() for step in range(30)) + 1
