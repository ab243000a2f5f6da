"""Saves that go well, by a real worker."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from aiockpt.format.image import BLOCK_NBYTES
from aiockpt.planning.local import Entry, plan_local
from aiockpt.protocol.messages import Beat, Committed, Progress, Staged
from aiockpt.storage.claim import RunClaim
from tests.files import names
from tests.waiting import wait_until
from tests.worker.driver import Save, Snapshot, check_checkpoint, snapshot, worker

pytestmark = pytest.mark.process


def test_a_commit_is_whole(tmp_path: Path) -> None:
    """The checkpoint verifies, safetensors reads each file, and nothing else is left in the run."""
    shot = snapshot(("model", 20 << 20), ("optimizer", 4096), plain={"model/config.json": b"{}", "top.json": b""})
    save = Save(shot, step=3, ordinal=5)
    with worker(tmp_path / "run") as child:
        committed = child.commit(save)
        assert committed.path == str(tmp_path / "run" / "step-3")
        assert {"write", "sync", "commit", "buffered"} <= committed.timings.keys()
        assert child.states(save) == ["staged", "written", "committing"]
        assert child.close_politely() == 0
    manifest = check_checkpoint(tmp_path / "run" / "step-3", save)
    assert (manifest.head.term, manifest.head.ordinal) == (1, 5)
    assert manifest.head.nbytes == committed.nbytes
    assert (tmp_path / "run/step-3/model/config.json").read_bytes() == b"{}"
    assert sorted(os.listdir(tmp_path / "run")) == [".lock", "step-3"]


def test_blocks_are_written_before_staging_ends(tmp_path: Path) -> None:
    """A block goes to the disk as soon as it is staged, and not before."""
    save = Save(snapshot(("model", 3 * BLOCK_NBYTES)), step=1)
    with worker(tmp_path / "run") as child:
        child.begin(save)
        child.fill(save.shot)
        image = save.shot.plan.files[0]
        child.send(Staged(save_id=save.save_id, file=0, upto=image.data_start + 2 * BLOCK_NBYTES - 1))
        child.next_where(lambda m: isinstance(m, Progress) and m.written == BLOCK_NBYTES)
        child.next(Beat)
        assert child.states(save) == ["staging"]
        (attempt,) = names(tmp_path / "run", ".step-1.")
        with open(tmp_path / "run" / attempt / image.path, "rb") as file:
            assert file.read(image.data_start).strip(b"\0") == b"", "the header is written last"
            file.seek(image.data_start)
            assert file.read(1 << 20) == child.arena[image.data_start :][: 1 << 20]
        child.stage(save)
        child.end(save)
        assert isinstance(child.outcome(save), Committed)
    check_checkpoint(tmp_path / "run/step-1", save)


def test_saves_follow_each_other_in_one_arena(tmp_path: Path) -> None:
    """The slot is used again and again, for other states too; a larger one makes a new arena."""
    with worker(tmp_path / "run") as child:
        for step, nbytes in enumerate((1 << 20, 1 << 20, 1000, 40 << 20, 5000)):
            save = Save(snapshot(("model", nbytes), seed=step), step=step, ordinal=step + 1)
            child.commit(save)
            check_checkpoint(tmp_path / f"run/step-{step}", save)


def test_sizes_around_the_block(tmp_path: Path) -> None:
    """Tails are cut exactly; an empty tensor is one."""
    sizes = [0, 1, 4095, 4096, BLOCK_NBYTES - 12, BLOCK_NBYTES, BLOCK_NBYTES + 1]
    with worker(tmp_path / "run") as child:
        assert child.reserve(2 * BLOCK_NBYTES).error is None
        for step, nbytes in enumerate(sizes):
            save = Save(snapshot(("model", nbytes)), step=step)
            child.commit(save)
            check_checkpoint(tmp_path / f"run/step-{step}", save)


def test_a_state_without_tensors(tmp_path: Path) -> None:
    """Values alone make a checkpoint of a manifest alone."""
    save = Save(Snapshot(plan_local([], {"a": -1, "b": -2}), [], []), step=1)
    with worker(tmp_path / "run") as child:
        assert child.reserve(4096).error is None
        child.commit(save)
    check_checkpoint(tmp_path / "run/step-1", save)
    assert os.listdir(tmp_path / "run/step-1") == ["manifest.json"]


def test_a_file_of_empty_tensors(tmp_path: Path) -> None:
    """A file whose data section is empty has a header alone, and no block."""
    entries = [Entry(("model", "nothing"), "F32", (0, 3))]
    save = Save(Snapshot(plan_local(entries, {"model": {"nothing": 0}, "a": -1, "b": -2}), [b""], entries), step=1)
    with worker(tmp_path / "run") as child:
        child.commit(save)
    check_checkpoint(tmp_path / "run/step-1", save)


def test_the_end_of_staging_stands_for_every_byte(tmp_path: Path) -> None:
    """What was not announced file by file is staged when staging ends."""
    save = Save(snapshot(), step=1)
    with worker(tmp_path / "run") as child:
        child.begin(save)
        child.fill(save.shot)
        child.end(save)
        assert isinstance(child.outcome(save), Committed)
    check_checkpoint(tmp_path / "run/step-1", save)


def test_many_folders_take_few_descriptors(tmp_path: Path) -> None:
    """Hundreds of files are written with a bounded number of them open."""
    save = Save(snapshot(*((f"part{i}", 100) for i in range(300))), step=1)
    with worker(tmp_path / "run") as child:
        before = len(os.listdir(f"/proc/{child.pid}/fd"))
        child.begin(save)
        child.fill(save.shot)
        wait_until(lambda: names(tmp_path / "run", ".step-1."), "the attempt")
        assert len(os.listdir(f"/proc/{child.pid}/fd")) < before + 40
        child.end(save)
        assert isinstance(child.outcome(save, timeout=60), Committed)
    check_checkpoint(tmp_path / "run/step-1", save)


def test_a_step_that_stands_is_refused_without_overwrite(tmp_path: Path) -> None:
    """The old checkpoint stands, the new save fails alone."""
    first, second = Save(snapshot(seed=1), step=1), Save(snapshot(seed=2), step=1, ordinal=2)
    with worker(tmp_path / "run") as child:
        child.commit(first)
        child.start_save(second)
        error = child.outcome(second)
        assert error.kind == "exists"
        check_checkpoint(tmp_path / "run/step-1", first)
        assert names(tmp_path / "run", ".step") == []


def test_overwrite_replaces_and_removes_the_old_one(tmp_path: Path) -> None:
    """After the commit the new checkpoint stands alone."""
    first, second = Save(snapshot(seed=1), step=1), Save(snapshot(seed=2), step=1, ordinal=2)
    with worker(tmp_path / "run") as child:
        child.commit(first)
        child.commit(second, overwrite=True)
        check_checkpoint(tmp_path / "run/step-1", second)
        assert child.close_politely() == 0
    assert sorted(os.listdir(tmp_path / "run")) == [".lock", "step-1"]


def test_retention_removes_what_it_was_told(tmp_path: Path) -> None:
    """Names that are gone are reported; one that is being read stays; one that never was is no error."""
    with worker(tmp_path / "run") as child:
        for step in range(3):
            child.commit(Save(snapshot(), step=step, ordinal=step + 1))
        with open(tmp_path / "run/step-1/manifest.json", "rb") as reader:
            fcntl.flock(reader, fcntl.LOCK_SH)
            committed = child.commit(Save(snapshot(), step=3, ordinal=4), prune=["step-0", "step-1", "step-77"])
        assert committed.pruned == ["step-0"]
        assert child.close_politely() == 0
    assert sorted(os.listdir(tmp_path / "run")) == [".lock", "step-1", "step-2", "step-3"]


def test_what_former_jobs_left_is_swept(tmp_path: Path) -> None:
    """Trash goes after Ready, directories and files."""
    run = tmp_path / "run"
    for i in range(3):
        (run / f".trash.{i}" / "model").mkdir(parents=True)
        (run / f".trash.{i}" / "model" / "file").write_bytes(b"x" * 1000)
    (run / ".trash.file").write_bytes(b"")
    with worker(run) as child:
        wait_until(lambda: not names(run, ".trash"), "the sweep")
        child.commit(Save(snapshot(), step=1))


def test_an_attempt_holds_its_byte_of_the_lock(tmp_path: Path) -> None:
    """Another job sees an open attempt, and none after the commit."""
    run = str(tmp_path / "run")
    claim = RunClaim.take(run, linger_timeout=1)
    try:
        with worker(tmp_path / "run", term=claim.term) as child:
            save = Save(snapshot(), step=1)
            assert claim._lock.wait_attempts(0)
            child.begin(save)
            wait_until(lambda: not claim._lock.wait_attempts(0), "the attempt's lock")
            child.stage(save)
            child.end(save)
            child.outcome(save)
            assert claim._lock.wait_attempts(0)
            assert claim.find(1, save.save_id) is not None
    finally:
        claim.release()


def test_another_worker_adopts_the_arena(tmp_path: Path) -> None:
    """The snapshot outlives the worker that made the arena."""
    save = Save(snapshot(), step=1)
    with worker(tmp_path / "run") as first, worker(tmp_path / "run") as second:
        first.begin(save)
        first.fill(save.shot)
        first.kill()
        second.adopt(first)
        save.attempt = 1
        second.begin(save)
        second.end(save)
        assert isinstance(second.outcome(save), Committed)
    check_checkpoint(tmp_path / "run/step-1", save)
