"""Taking checkpoints out of a run: not while somebody reads them; removal of what is on its way out."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aiockpt.errors import StorageError
from aiockpt.storage import commit as commit_module
from aiockpt.storage.claim import RunClaim
from aiockpt.storage.commit import remove_tree, retire, to_trash
from aiockpt.storage.faults import FaultPoint
from aiockpt.storage.readers import AlignedBuffer, open_checkpoint
from aiockpt.storage.run_directory import scan
from aiockpt.testing.faults import ArmedFaults, FaultPlan, FaultRule
from tests.storage.making import commit, content, opened, save_id
from tests.storage.processes import child

READER = """
    from aiockpt.storage.readers import open_checkpoint
    opened = open_checkpoint(sys.argv[1])
    say("reading")
    hear()
    opened.close()
    say("closed")
    hear()
"""


@pytest.fixture
def run_fd(tmp_path: Path) -> Iterator[int]:
    commit(tmp_path, 1, number=1)
    fd = opened(tmp_path)
    yield fd
    os.close(fd)


def test_a_checkpoint_that_nobody_reads(run_fd: int, tmp_path: Path) -> None:
    """It leaves the run at once and is removed later."""
    gone = retire(run_fd, "step-1")
    assert gone is not None
    assert os.listdir(tmp_path) == [gone]
    assert scan(str(tmp_path)).checkpoints == []
    assert remove_tree(run_fd, gone)
    assert os.listdir(tmp_path) == []
    assert retire(run_fd, "step-1") is None


@pytest.mark.process
def test_a_checkpoint_that_another_process_reads(run_fd: int, tmp_path: Path) -> None:
    """It is left until that has closed it."""
    with child(READER, tmp_path / "step-1") as reader:
        reader.expect("reading")
        assert retire(run_fd, "step-1") is None
        assert len(scan(str(tmp_path)).checkpoints) == 1
        reader.tell()
        reader.expect("closed")
        assert retire(run_fd, "step-1") is not None


@pytest.mark.process
def test_a_reader_that_is_killed(run_fd: int, tmp_path: Path) -> None:
    """Its lock goes with it."""
    with child(READER, tmp_path / "step-1") as reader:
        reader.expect("reading")
        reader.process.kill()
        reader.wait()
        assert retire(run_fd, "step-1") is not None


def test_two_readers_in_this_process(run_fd: int, tmp_path: Path) -> None:
    """The first to close does not give the other's checkpoint away."""
    first, second = (open_checkpoint(str(tmp_path / "step-1")) for _ in range(2))
    first.close()
    assert retire(run_fd, "step-1") is None
    second.close()
    assert retire(run_fd, "step-1") is not None


def test_what_is_open_can_be_read_to_its_end(run_fd: int, tmp_path: Path) -> None:
    """Also where somebody removes it by force."""
    with open_checkpoint(str(tmp_path / "step-1")) as checkpoint:
        remove_tree(run_fd, "step-1")
        assert checkpoint.file(0).read_block(0, AlignedBuffer()) == content(1, 5000)


def test_what_it_had_replaced_goes_with_it(run_fd: int, tmp_path: Path) -> None:
    """A death left that aside: when the step is removed, the next claim must not bring the older one back for it."""
    commit(tmp_path, 11, number=2)
    for step in (1, 11):
        (tmp_path / f"step-{step}").rename(tmp_path / f".old.step-{step}.{save_id(9)}")
    commit(tmp_path, 1, number=3)
    assert retire(run_fd, "step-2") is None
    assert retire(run_fd, "step-1") is not None
    claim = RunClaim.take(str(tmp_path), linger_timeout=1)
    claim.release()
    assert [known.step for known in claim.checkpoints] == [11]


def test_a_damaged_checkpoint(run_fd: int, tmp_path: Path) -> None:
    """Without a manifest nobody can read it."""
    os.unlink(tmp_path / "step-1" / "manifest.json")
    assert retire(run_fd, "step-1") is not None


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(code: int, run_fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers read and retention retires: what they have open stays readable."""

    def flock(fd: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(commit_module.fcntl, "flock", flock)
    with open_checkpoint(str(tmp_path / "step-1")) as checkpoint:
        gone = retire(run_fd, "step-1")
        assert gone is not None
        remove_tree(run_fd, gone)
        assert checkpoint.file(0).read_block(0, AlignedBuffer()) == content(1, 5000)


def test_another_error_of_the_lock(run_fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told, and the checkpoint stands."""

    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(commit_module.fcntl, "flock", flock)
    with pytest.raises(StorageError) as caught:
        retire(run_fd, "step-1")
    assert caught.value.errno == errno.EIO


def test_links_are_not_followed(run_fd: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What they point at is none of ours."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "precious").write_text("x")
    (tmp_path / "step-1" / "link").symlink_to(outside)
    assert remove_tree(run_fd, "step-1")
    (tmp_path / "a-file").write_text("x")
    assert remove_tree(run_fd, "a-file")
    (tmp_path / "a-link").symlink_to(outside)
    assert remove_tree(run_fd, "a-link")
    assert os.listdir(tmp_path) == []
    assert os.listdir(outside) == ["precious"]


def test_nothing_to_remove(run_fd: int) -> None:
    """Neither is an error."""
    assert not remove_tree(run_fd, "nothing")
    assert to_trash(run_fd, "nothing") is None


def test_removing_the_same_tree_from_several_sides(run_fd: int, tmp_path: Path) -> None:
    """Nobody fails, and all of it is gone."""
    for number in range(200):
        (tmp_path / "step-1" / f"extra-{number}").write_text("")
    begin = threading.Barrier(4)

    def remove(_: int) -> None:
        begin.wait(30)
        remove_tree(run_fd, "step-1")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(remove, range(4)))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("point", [FaultPoint.WORKER_PRUNE, FaultPoint.WORKER_REMOVE])
def test_an_errno(point: FaultPoint, run_fd: int, tmp_path: Path) -> None:
    """A StorageError with the path; the checkpoint stands."""
    faults = ArmedFaults(FaultPlan(rules=[FaultRule(point=point, action="errno", errno=errno.EACCES)]))
    with pytest.raises(StorageError) as caught:
        remove_tree(run_fd, retire(run_fd, "step-1", faults=faults) or "", faults=faults)
    assert caught.value.errno == errno.EACCES
    assert str(caught.value.path).startswith(str(tmp_path))
