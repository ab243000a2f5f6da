"""Signs of life, and that they say what moves."""

from __future__ import annotations

import io
import os
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from aiockpt.format.image import BLOCK_NBYTES
from aiockpt.protocol.messages import Beat, Progress
from aiockpt.worker import sweeper as sweeper_module
from aiockpt.worker.activity import Activity
from aiockpt.worker.run import Run
from aiockpt.worker.stderr import GuardedStderr
from aiockpt.worker.sweeper import Sweeper
from tests.files import names
from tests.waiting import wait_until
from tests.worker.driver import Save, check_checkpoint, rule, snapshot, worker


@pytest.mark.process
def test_a_slow_disk_is_seen_to_move(tmp_path: Path) -> None:
    """Every block moves the beat's count, and a file operation is named while it is under way."""
    save = Save(snapshot(("model", 8 * BLOCK_NBYTES)), step=1)
    with worker(tmp_path / "run", odd="Throttled:0.2", beat=0.02) as child:
        child.start_save(save)
        child.outcome(save)
        beats = [m for m in child.seen if isinstance(m, Beat)]
        moved = [beat.moved for beat in beats]
        assert moved == sorted(moved)
        assert len(set(moved)) >= 2
        assert any(beat.busy == "write model/model-00001-of-00001.safetensors" for beat in beats)
        written = [m.written for m in child.seen if isinstance(m, Progress)]
        assert written == sorted(written)
        assert len(set(written)) >= 3
    check_checkpoint(tmp_path / "run/step-1", save)


@pytest.mark.process
def test_a_hanging_disk_is_seen_to_stand_still(tmp_path: Path) -> None:
    """The loop beats on, its count stands, and the call that hangs is named: the trainer may draw its conclusions."""
    save = Save(snapshot(), step=1)
    with worker(tmp_path / "run", faults=rule("worker.file_sync", "delay", seconds=30), beat=0.02) as child:
        child.start_save(save)
        child.next_where(lambda m: isinstance(m, Beat) and m.busy.startswith("sync "))
        beats: list[Beat] = []
        while len(beats) < 10 or len({(beat.moved, beat.busy) for beat in beats[-10:]}) > 1:
            beats.append(child.next(Beat))
            assert len(beats) < 500
        assert beats[-1].busy.startswith("sync ")


@pytest.mark.process
def test_an_idle_worker_is_not_busy(tmp_path: Path) -> None:
    """It beats, and names nothing."""
    with worker(tmp_path / "run", beat=0.01) as child:
        beats = [child.next(Beat) for _ in range(5)]
        assert beats[-1].busy == ""


def test_activity_names_the_oldest() -> None:
    """Of several operations in several threads; a failed one counts as ended."""
    activity = Activity()
    with activity.operation("first"):
        with activity.operation("second"):
            assert activity.look() == (0, "first")
        assert activity.look() == (1, "first")
    with pytest.raises(OSError, match="no"), activity.operation("third"):
        raise OSError("no")
    assert activity.look() == (3, "")


def test_stderr_never_raises_nor_waits() -> None:
    """A full pipe, a reader that is gone, and a closed descriptor cost the text and nothing else."""
    read, write = os.pipe2(os.O_NONBLOCK)
    guard = GuardedStderr(write)
    print("ä line", file=guard)
    assert os.read(read, 100) == "ä line\n".encode()
    for _ in range(100):
        guard.write("x" * 10_000)
    assert guard.dropped > 500_000
    os.close(read)
    guard.write("nobody reads")
    os.close(write)
    guard.write("\udcff")
    assert isinstance(guard, io.TextIOBase)


@pytest.mark.process
def test_a_trainer_that_reads_no_stderr(tmp_path: Path) -> None:
    """A megabyte of lines in the middle of a save, into a pipe that nobody empties."""
    save = Save(snapshot(), step=1)
    with worker(tmp_path / "run", odd="Chatty:") as child:
        child.commit(save)
        assert "xxxx" in child.words()
    check_checkpoint(tmp_path / "run/step-1", save)


def test_sweeping_stands_back_for_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What former jobs left waits while a save is open, what retention removed does not; who waits gets it all."""
    for name in (".trash.a", ".trash.b", "later"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(sweeper_module, "PATIENCE_SECONDS", 60.0)

    async def body() -> None:
        run = Run(str(tmp_path), 1)
        run.open()
        sweeper = Sweeper(run, Activity())
        with sweeper.standing_back():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(sweeper.run)
                with anyio.fail_after(20):
                    await anyio.to_thread.run_sync(wait_until, lambda: sweeper._left_over, "the look into the run")
                    (tmp_path / "later").rename(tmp_path / ".trash.new")
                    sweeper.add(".trash.new")
                    await anyio.to_thread.run_sync(wait_until, lambda: not names(tmp_path, ".trash.new"), "the removal")
                    assert names(tmp_path, ".trash") == [".trash.a", ".trash.b"]
                    assert not sweeper.is_idle
                    await sweeper.wait_idle()
                    assert names(tmp_path, ".trash") == []
                tasks.cancel_scope.cancel()
        os.close(run.fd)
        run._lock.close()

    anyio.run(body)
