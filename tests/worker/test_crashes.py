"""Workers that are killed in mid-save, and their successors."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from aiockpt.format.names import attempt_name
from aiockpt.protocol.messages import Committed
from aiockpt.storage.commit import to_trash
from aiockpt.storage.faults import FaultPoint
from tests.crash.points import OF_RANKS, STARTING
from tests.files import names
from tests.waiting import wait_until
from tests.worker.driver import Ended, Save, check_checkpoint, rule, snapshot, state_of, worker

pytestmark = [pytest.mark.process, pytest.mark.crash]

ELSEWHERE = {*map(str, STARTING | OF_RANKS), "worker.torn", "worker.remove"}
POINTS = [str(point) for point in FaultPoint if point.startswith("worker.") and point not in ELSEWHERE]
"""Every point that a save passes before its outcome; a new one is tested by existing."""


def die(child, save: Save, **options: object) -> None:
    """Let the worker die on a save."""
    with pytest.raises(Ended):
        child.start_save(save, **options)
        child.outcome(save)
    assert child.wait() == -signal.SIGKILL


def fence(run: Path, save: Save) -> None:
    """What the trainer does between two workers."""
    fd = os.open(run, os.O_RDONLY)
    try:
        to_trash(fd, attempt_name(save.step, save.save_id, save.attempt))
    finally:
        os.close(fd)


TORN = [("worker.block_write", "torn"), ("worker.manifest_write", "torn")]


@pytest.mark.parametrize(("point", "action"), [*((point, "kill") for point in POINTS), *TORN])
def test_a_killed_worker_s_save_is_retried(tmp_path: Path, point: str, action: str) -> None:
    """From the arena, in an attempt of its own; what the dead one published already is found, not written again."""
    run = tmp_path / "run"
    old, save = Save(snapshot(seed=1), step=1), Save(snapshot(seed=2), step=1, ordinal=2)
    options = {"overwrite": True, "prune": ["step-0"]}
    with worker(run, faults=rule(point, action), ready=False) as first, worker(run) as second:
        second.commit(Save(snapshot(), step=0))
        second.commit(old)
        assert first.get_ready().error is None
        die(first, save, **options)
        was_published = (run / "step-1").exists() and (run / "step-1/manifest.json").stat().st_ino
        fence(run, save)
        save.attempt += 1
        second.adopt(first)
        second.begin(save, **options)
        second.end(save)
        committed = second.outcome(save)
        assert isinstance(committed, Committed)
        if point in POINTS[POINTS.index("worker.after_rename") :]:
            assert (run / "step-1/manifest.json").stat().st_ino == was_published
        assert second.states(save) == ["staged", "written", "committing"]
        check_checkpoint(run / "step-1", save)
        follower = Save(snapshot(seed=3), step=2, ordinal=3)
        second.commit(follower)
        assert second.close_politely() == 0
    assert names(run, "step-") == ["step-1", "step-2"]
    leftovers = {name for name in os.listdir(run) if name.startswith((".step-", ".old"))}
    assert not leftovers


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_late_worker_finds_nothing_to_rename(tmp_path: Path, overwrite: bool) -> None:
    """A worker that was stopped before its rename wakes up behind the fence, its retry committed."""
    run = tmp_path / "run"
    save = Save(snapshot(), step=1)
    with worker(run, odd="StoppedBeforeRename:") as first, worker(run) as second:
        first.start_save(save, overwrite=overwrite)
        wait_until(lambda: state_of(first.pid) == "T", "the stop")
        fence(run, save)
        retry = Save(save.shot, step=1, save_id=save.save_id, attempt=1)
        second.commit(retry)
        os.kill(first.pid, signal.SIGCONT)
        assert first.outcome(save).kind == ("fenced" if overwrite else "exists")
        check_checkpoint(run / "step-1", save)


@pytest.mark.parametrize("point", ["worker.allocating", "worker.reserved"])
def test_killed_while_it_allocates(tmp_path: Path, point: str) -> None:
    """The trainer has no descriptor, so nothing of the arena is left."""
    with worker(tmp_path / "run", faults=rule(point, "kill")) as child:
        with pytest.raises(Ended):
            child.reserve(1 << 20)
        assert child.wait() == -signal.SIGKILL


def test_killed_while_it_removes(tmp_path: Path) -> None:
    """What retention took out of the run is gone from it already; the next worker deletes the rest."""
    run = tmp_path / "run"
    with worker(run, faults=rule("worker.remove", "kill")) as child:
        child.commit(Save(snapshot(), step=1))
        with contextlib.suppress(Ended):
            child.start_save(Save(snapshot(), step=2, ordinal=2), prune=["step-1"])
        assert child.wait() == -signal.SIGKILL
    assert names(run, "step-") == ["step-2"]
    assert len(names(run, ".trash.")) == 1
    with worker(run):
        wait_until(lambda: not names(run, ".trash."), "the sweep")


def test_killed_at_its_start(tmp_path: Path) -> None:
    """No Hello comes, and the socket ends."""
    with worker(tmp_path / "run", faults=rule("worker.started", "kill"), ready=False) as child:
        with pytest.raises(Ended):
            child.get_ready()
        assert child.wait() == -signal.SIGKILL
