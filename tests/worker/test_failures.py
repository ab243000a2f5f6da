"""Requests that fail: each fails alone, and the worker serves on."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest

from aiockpt.format.names import attempt_name
from aiockpt.storage.commit import to_trash
from aiockpt.testing.faults import FaultPlan, FaultRule
from tests.files import make_read_only, names, small_disk
from tests.waiting import wait_until
from tests.worker.driver import Save, Switch, check_checkpoint, rule, snapshot, state_of, worker

pytestmark = pytest.mark.process

BEFORE_THE_RENAME = [
    "worker.attempt_made",
    "worker.open_direct",
    "worker.preallocate",
    "worker.block_write",
    "worker.file_sync",
    "worker.files_durable",
    "worker.manifest_write",
    "worker.manifest_durable",
    "worker.before_rename",
]


def check_next(child, run: Path, step: int = 2) -> None:
    follower = Save(snapshot(seed=9), step=step, ordinal=9)
    child.commit(follower)
    check_checkpoint(run / f"step-{step}", follower)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_an_errno_fails_one_save(tmp_path: Path, code: int) -> None:
    """Wherever it comes: the attempt is removed, the error has errno, path and advice; the next save succeeds."""
    run = tmp_path / "run"
    switch = Switch(tmp_path / "switch")
    with worker(run, odd=switch.spec) as child:
        for step, point in enumerate(BEFORE_THE_RENAME):
            switch.set(rule(point, "errno", errno=code))
            save = Save(snapshot(), step=step)
            child.start_save(save)
            error = child.outcome(save)
            assert (point, error.kind, error.errno) == (point, "storage", code)
            assert os.strerror(code) in error.why
            assert error.next
            assert error.path
            assert error.path.startswith(str(run))
            assert names(run, ".step-") == names(run, f"step-{step}") == []
            switch.set(FaultPlan())
            check_next(child, run, step=step)


def test_an_errno_after_the_rename_leaves_the_outcome_open(tmp_path: Path) -> None:
    """The checkpoint stands, and is not reported as committed nor as failed."""
    run = tmp_path / "run"
    switch = Switch(tmp_path / "switch")
    with worker(run, odd=switch.spec) as child:
        for step, point in enumerate(["worker.after_rename", "worker.run_synced"]):
            switch.set(rule(point, "errno", errno=errno.EIO))
            save = Save(snapshot(), step=step)
            child.start_save(save)
            assert child.outcome(save).kind == "unknown_commit"
            check_checkpoint(run / f"step-{step}", save)
        switch.set(rule("worker.before_report", "errno", errno=errno.EIO))  # where nothing is tried
        check_next(child, run)


def test_an_errno_in_retention_costs_no_commit(tmp_path: Path) -> None:
    """The new checkpoint is reported; the old one stays."""
    run = tmp_path / "run"
    with worker(run, faults=rule("worker.prune", "errno", errno=errno.EIO)) as child:
        child.commit(Save(snapshot(), step=1))
        assert child.commit(Save(snapshot(), step=2, ordinal=2), prune=["step-1"]).pruned == []
        assert names(run, "step-") == ["step-1", "step-2"]
        assert child.commit(Save(snapshot(), step=3, ordinal=3), prune=["step-1"]).pruned == ["step-1"]


def test_an_attempt_that_cannot_be_removed_is_left(tmp_path: Path) -> None:
    """The save has failed for its own reason, and says so; the next job reaps the rest."""
    run = tmp_path / "run"
    plan = FaultPlan(
        rules=[
            FaultRule(point="worker.file_sync", action="errno", errno=errno.EIO),
            FaultRule(point="worker.remove", action="errno", errno=errno.EACCES),
        ]
    )
    with worker(run, faults=plan) as child:
        save = Save(snapshot(), step=1)
        child.start_save(save)
        assert child.outcome(save).errno == errno.EIO
        assert names(run, ".step-1.") == [attempt_name(1, save.save_id, 0)]
        assert "is left in the run" in child.words()
        check_next(child, run)


def test_an_errno_while_replacing_puts_the_old_one_back(tmp_path: Path) -> None:
    """Between the two renames of an overwrite the old checkpoint is not lost."""
    run = tmp_path / "run"
    first, second = Save(snapshot(seed=1), step=1), Save(snapshot(seed=2), step=1, ordinal=2)
    with worker(run, faults=rule("worker.old_aside", "errno", errno=errno.EIO)) as child:
        child.commit(first)
        child.start_save(second, overwrite=True)
        assert child.outcome(second).kind == "storage"
        check_checkpoint(run / "step-1", first)


def test_a_torn_write_is_never_published(tmp_path: Path) -> None:
    """Half a block on the disk, then EIO."""
    run = tmp_path / "run"
    switch = Switch(tmp_path / "switch")
    with worker(run, odd=switch.spec) as child:
        for point in ("worker.block_write", "worker.manifest_write"):
            switch.set(rule(point, "torn", errno=errno.EIO))
            save = Save(snapshot(), step=1)
            child.start_save(save)
            assert child.outcome(save).errno == errno.EIO
            assert names(run, "step-") == names(run, ".step-") == []
        check_next(child, run)


def test_direct_io_refused_at_open(tmp_path: Path) -> None:
    """The file is written through the page cache, and the timings say so."""
    save = Save(snapshot(), step=1)
    with worker(tmp_path / "run", faults=rule("worker.open_direct", "errno", errno=errno.EINVAL, nth=0)) as child:
        assert child.commit(save).timings["buffered"] == 1.0
    check_checkpoint(tmp_path / "run/step-1", save)


def test_direct_io_refused_at_a_write(tmp_path: Path) -> None:
    """As some file systems do that took the flag: the same block goes through the page cache, and all that follow."""
    save = Save(snapshot(("model", 40 << 20)), step=1)
    refusal = rule("worker.block_write", "errno", errno=errno.EINVAL, path="*.safetensors", nth=2)
    with worker(tmp_path / "run", faults=refusal) as child:
        assert child.commit(save).timings["buffered"] == 1.0
    check_checkpoint(tmp_path / "run/step-1", save)


def test_a_full_disk_fails_one_save(tmp_path: Path) -> None:
    """ENOSPC shows before a byte is written; a smaller save fits afterwards."""
    with small_disk(tmp_path / "disk", "4m") as disk, worker(run := disk / "run") as child:
        save = Save(snapshot(("model", 8 << 20)), step=1)
        child.begin(save)
        error = child.outcome(save)
        assert error.errno == errno.ENOSPC
        assert names(run, ".step-") == []
        check_next(child, run)


def test_a_save_waits_for_the_room_that_retention_makes(tmp_path: Path) -> None:
    """A disk that holds two checkpoints takes one after the other, with one kept."""
    with small_disk(tmp_path / "disk", "9m") as disk, worker(run := disk / "run") as child:
        for step in range(6):
            save = Save(snapshot(("model", 4 << 20), seed=step), step=step, ordinal=step + 1)
            child.commit(save, prune=[f"step-{step - 1}"] if step else [])
            check_checkpoint(run / f"step-{step}", save)


def test_an_attempt_that_was_moved_away_is_fenced(tmp_path: Path) -> None:
    """Whether it is removed before its files are made, or only renamed before its own rename."""
    run = tmp_path / "run"
    for odd, remove in (("StoppedWhenMade:", True), ("StoppedBeforeRename:", False)):
        with worker(run, odd=odd) as child:
            save = Save(snapshot(), step=1)
            child.start_save(save)
            wait_until(lambda child=child: state_of(child.pid) == "T", "the stop")
            move_away(run, attempt_name(1, save.save_id, 0), remove=remove)
            os.kill(child.pid, signal.SIGCONT)
            assert child.outcome(save).kind == "fenced"
            assert names(run, "step-") == names(run, ".step-") == []


def move_away(run: Path, name: str, *, remove: bool) -> None:
    fd = os.open(run, os.O_RDONLY)
    try:
        trash = to_trash(fd, name)
    finally:
        os.close(fd)
    assert trash is not None
    if remove:
        shutil.rmtree(run / trash)


def test_a_higher_term_fences(tmp_path: Path) -> None:
    """A job that came later, over a file system whose locks do not reach."""
    run = tmp_path / "run"
    save = Save(snapshot(), step=1)
    with worker(run, term=3) as child:
        (run / ".term-3").touch()
        child.commit(Save(snapshot(), step=0))
        (run / ".term-4").touch()
        child.start_save(save)
        assert child.outcome(save).kind == "fenced"
        assert names(run, "step-") == ["step-0"]
        assert names(run, ".step-") == []


def test_a_run_directory_that_goes_away(tmp_path: Path) -> None:
    """That is no fence, but ENOENT, before the attempt is made and behind it."""
    run = tmp_path / "run"
    with worker(run, odd="StoppedBeforeRename:") as child:
        for step in range(2):
            save = Save(snapshot(), step=step)
            child.start_save(save)
            if not step:
                wait_until(lambda: state_of(child.pid) == "T", "the stop")
                shutil.rmtree(run)
                os.kill(child.pid, signal.SIGCONT)
            error = child.outcome(save)
            assert (error.kind, error.errno, error.path) == ("storage", errno.ENOENT, str(run))
        assert child.close_politely() == 0


def test_a_bug_fails_one_save_with_its_traceback(tmp_path: Path) -> None:
    """An error that no errno names is data too."""
    run = tmp_path / "run"
    save = Save(snapshot(), step=1)
    with worker(run, odd="Bug:") as child:
        child.start_save(save)
        error = child.outcome(save)
        assert error.kind == "internal"
        assert "a bug of ours" in error.why
        assert "writer.py" in error.traceback
        assert "a bug of ours" in child.words()
        check_next(child, run)


@pytest.mark.parametrize("kind", ["missing", "a file", "below a file"])
def test_a_run_that_cannot_be_used(tmp_path: Path, kind: str) -> None:
    """Ready says why, and the worker ends."""
    (tmp_path / "file").write_text("")
    run = {"missing": tmp_path / "none", "a file": tmp_path / "file", "below a file": tmp_path / "file" / "run"}[kind]
    with worker(tmp_path, ready=False) as child:
        child.run = run
        error = child.get_ready().error
        assert error is not None
        assert error.kind == "config"
        assert str(run) in error.what
        assert child.wait() == 66


def test_a_run_on_a_read_only_disk(tmp_path: Path) -> None:
    """Found by writing, as modes and access() do not say it."""
    with small_disk(tmp_path / "disk", "1m") as disk:
        run = disk / "run"
        run.mkdir()
        make_read_only(disk)
        with worker(run, ready=False) as child:
            error = child.get_ready().error
            assert error is not None
            assert (error.kind, error.errno) == ("storage", errno.EROFS)
            assert child.wait() == 66


def test_a_fault_layer_that_does_not_load(tmp_path: Path) -> None:
    """The worker ends with the traceback in its last words."""
    with worker(tmp_path / "run", ready=False, odd="Fails:") as child:
        assert child.wait() == 70
        assert "no fault layer today" in child.words()
