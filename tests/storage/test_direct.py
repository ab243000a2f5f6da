"""Writing one file: exact bytes by any way, errors with their figures, durable in the right order."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aiockpt.errors import StorageError
from aiockpt.format.image import round_up
from aiockpt.storage import direct
from aiockpt.storage.direct import FileWriter, set_direct, sync_dir, write_small
from aiockpt.storage.faults import NO_FAULTS, FaultPoint, Faults
from aiockpt.storage.file_reader import AlignedBuffer
from aiockpt.storage.system_calls import direct_alignment, fallocate, start_writeback
from aiockpt.testing.faults import ArmedFaults, FaultPlan, FaultRule
from tests.storage.making import content, opened
from tests.storage.processes import run

BLOCK = 64 << 10


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    fd = opened(tmp_path)
    yield fd
    os.close(fd)


def armed(point: FaultPoint, action: str = "errno", **fields: object) -> ArmedFaults:
    return ArmedFaults(FaultPlan(rules=[FaultRule(point=point, action=action, **fields)]))  # type: ignore[arg-type]


def write(directory: int, nbytes: int, *, threads: int = 4, faults: Faults = NO_FAULTS) -> FileWriter:
    """Write a file ``f`` of this size in blocks, as the worker does."""
    buffer = AlignedBuffer(nbytes)
    buffer.view[:nbytes] = content(1, nbytes)
    buffer.view[nbytes:] = b"\xff" * (buffer.nbytes - nbytes)
    writer = FileWriter.create(directory, "f", nbytes, faults=faults)
    try:
        with ThreadPoolExecutor(threads) as pool:
            starts = range(0, nbytes, BLOCK)
            stops = [min(start + BLOCK, round_up(nbytes)) for start in starts]
            list(pool.map(lambda a, b: writer.write(buffer.view[a:b], a), starts, stops))
        writer.finish()
    finally:
        writer.abort()
    return writer


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, BLOCK, 5 * BLOCK + 13])
def test_size_and_bytes_are_exact(nbytes: int, directory: int, tmp_path: Path) -> None:
    """The padding of the tail never reaches the file."""
    write(directory, nbytes)
    assert (tmp_path / "f").read_bytes() == content(1, nbytes)


def test_direct_io_is_used_where_there_is_some(directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write passes the page cache by, the padded tail too."""
    fd = os.open(tmp_path / "probe", os.O_RDWR | os.O_CREAT)
    has_direct_io = set_direct(fd)
    os.close(fd)
    if not has_direct_io:
        pytest.skip("this file system has no direct I/O")
    flags: list[int] = []
    real = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        flags.append(fcntl.fcntl(fd, fcntl.F_GETFL))
        return real(fd, data, offset)

    monkeypatch.setattr(direct.os, "pwrite", pwrite)
    assert not write(directory, 5 * BLOCK + 13).buffered
    assert len(flags) == 6
    assert all(flag & os.O_DIRECT for flag in flags)


def test_direct_io_refused_at_open(directory: int, tmp_path: Path) -> None:
    """The file is written through the page cache, and says so."""
    writer = write(directory, 3 * BLOCK + 1, faults=armed(FaultPoint.WORKER_OPEN_DIRECT, errno=errno.EINVAL))
    assert writer.buffered
    assert (tmp_path / "f").read_bytes() == content(1, 3 * BLOCK + 1)


@pytest.mark.parametrize("nth", [1, 3])
def test_direct_io_refused_at_a_write(nth: int, directory: int, tmp_path: Path) -> None:
    """The first refused write falls back, also where others are under way."""
    writer = write(directory, 8 * BLOCK + 1, faults=armed(FaultPoint.WORKER_BLOCK_WRITE, errno=errno.EINVAL, nth=nth))
    assert writer.buffered
    assert (tmp_path / "f").read_bytes() == content(1, 8 * BLOCK + 1)


class _RefusesDirect(Faults):
    """A file system that opens for direct I/O and then refuses every direct write."""

    def __init__(self) -> None:
        self.writer: FileWriter | None = None

    def at(self, point: FaultPoint, path: str = "") -> None:
        if point is FaultPoint.WORKER_BLOCK_WRITE and self.writer is not None and not self.writer.buffered:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def test_direct_io_refused_at_all_writes_at_once(directory: int, tmp_path: Path) -> None:
    """Many threads meet the refusal together: each writes again, none fails."""
    faults = _RefusesDirect()
    nbytes = 32 * BLOCK
    buffer = AlignedBuffer(nbytes)
    buffer.view[:] = content(1, nbytes)
    faults.writer = writer = FileWriter.create(directory, "f", nbytes, faults=faults)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda at: writer.write(buffer.view[at : at + BLOCK], at), range(0, nbytes, BLOCK)))
    writer.finish()
    assert writer.buffered
    assert (tmp_path / "f").read_bytes() == content(1, nbytes)


def test_an_unaligned_write_falls_back_by_itself(directory: int, tmp_path: Path) -> None:
    """What a real file system refuses is written too; where it takes all, nothing changes."""
    writer = FileWriter.create(directory, "f", 5)
    writer.write(memoryview(b"abcde"), 0)
    writer.finish()
    assert (tmp_path / "f").read_bytes() == b"abcde"


def test_einval_of_a_buffered_write_is_an_error(directory: int) -> None:
    """There is nothing left to fall back to."""
    faults = ArmedFaults(
        FaultPlan(
            rules=[
                FaultRule(point=FaultPoint.WORKER_OPEN_DIRECT, action="errno", errno=errno.EINVAL),
                FaultRule(point=FaultPoint.WORKER_BLOCK_WRITE, action="errno", errno=errno.EINVAL),
            ]
        )
    )
    with pytest.raises(StorageError) as caught:
        write(directory, 4096, faults=faults)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    "point",
    [
        FaultPoint.WORKER_OPEN_DIRECT,
        FaultPoint.WORKER_PREALLOCATE,
        FaultPoint.WORKER_BLOCK_WRITE,
        FaultPoint.WORKER_FILE_SYNC,
    ],
)
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_an_errno_at_any_point(point: FaultPoint, code: int, directory: int, tmp_path: Path) -> None:
    """It arrives with its errno, the file's path and a next step, and no descriptor stays open."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(StorageError) as caught:
        write(directory, 4096, faults=armed(point, errno=code))
    assert caught.value.errno == code
    assert caught.value.path == str(tmp_path / "f")
    assert os.strerror(code) in caught.value.why
    assert caught.value.next
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_preallocation(code: int, directory: int, tmp_path: Path) -> None:
    """It is noted, nothing else."""
    writer = write(directory, BLOCK + 1, faults=armed(FaultPoint.WORKER_PREALLOCATE, errno=code))
    assert not writer.preallocated
    assert (tmp_path / "f").read_bytes() == content(1, BLOCK + 1)


def test_a_full_disk_shows_before_the_first_write() -> None:
    """Needed and free bytes stand in the error; a tmpfs refuses at once what it can never hold."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="aiockpt-test-") as full:
        fd = opened(Path(full))
        try:
            with pytest.raises(StorageError) as caught:
                FileWriter.create(fd, "f", 1 << 46)
        finally:
            os.close(fd)
        assert caught.value.errno == errno.ENOSPC
        status = os.statvfs(full)
        assert f"needs {1 << 46} bytes" in caught.value.why
        assert "are free" in caught.value.why
        assert status.f_bavail
        assert "free space" in caught.value.next


@pytest.mark.process
def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """RLIMIT_FSIZE ends no process: it is a StorageError with EFBIG."""
    script = """
        import resource
        from aiockpt.storage.direct import FileWriter
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            FileWriter.create(os.open(sys.argv[1], os.O_RDONLY), "f", 2 << 20)
        except StorageError as exc:
            say(exc.errno)
    """
    assert run(script, tmp_path) == str(errno.EFBIG)


class _Short(Faults):
    """Writes that take less than they were given, as a signal or a full page of an NFS server leaves them."""

    def __init__(self, unit: int) -> None:
        self.unit = unit

    def clip(self, path: str, offset: int, nbytes: int) -> int:
        return min(nbytes, self.unit)


@pytest.mark.parametrize("unit", [4096, 12288, 1000])
def test_short_writes_are_continued(unit: int, directory: int, tmp_path: Path) -> None:
    """Aligned remainders stay direct, others go through the page cache."""
    write(directory, BLOCK + 77, faults=_Short(unit))
    assert (tmp_path / "f").read_bytes() == content(1, BLOCK + 77)


def test_an_existing_file_is_never_written_into(directory: int, tmp_path: Path) -> None:
    """Two tries in one directory would mix their bytes."""
    (tmp_path / "f").write_bytes(b"theirs")
    for attempt in (lambda: FileWriter.create(directory, "f", 10), lambda: write_small(directory, "f", b"ours")):
        with pytest.raises(StorageError) as caught:
            attempt()
        assert caught.value.errno == errno.EEXIST
    assert (tmp_path / "f").read_bytes() == b"theirs"


def test_a_directory_that_was_removed(tmp_path: Path) -> None:
    """ENOENT through the descriptor: the attempt was fenced."""
    (tmp_path / "d").mkdir()
    fd = opened(tmp_path / "d")
    (tmp_path / "d").rmdir()
    with pytest.raises(StorageError) as caught:
        FileWriter.create(fd, "f", 10)
    os.close(fd)
    assert caught.value.errno == errno.ENOENT


def test_the_size_is_durable_too(directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cut comes before the sync, both by the descriptor that wrote."""
    calls: list[tuple[str, int]] = []

    def recorded(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def call(fd: int, *arguments: object) -> object:
            calls.append((name, fd))
            return real(fd, *arguments)

        return call

    for name in ("pwrite", "ftruncate", "fdatasync", "close"):
        monkeypatch.setattr(direct.os, name, recorded(name))
    write(directory, 5000, threads=1)
    assert [name for name, _ in calls] == ["pwrite", "ftruncate", "fdatasync", "close"]
    assert len({fd for _, fd in calls}) == 1


def test_small_files(directory: int, tmp_path: Path) -> None:
    """They are whole, however short the writes, and an errno says what was not written."""
    write_small(directory, "a", b"x" * 10_000, faults=_Short(3000))
    assert (tmp_path / "a").read_bytes() == b"x" * 10_000
    with pytest.raises(StorageError, match="was not written") as caught:
        write_small(directory, "b", b"y", faults=armed(FaultPoint.WORKER_MANIFEST_WRITE, errno=errno.ENOSPC))
    assert caught.value.path == str(tmp_path / "b")


def test_abort_leaves_no_descriptor(directory: int) -> None:
    """Twice is as good as once."""
    before = os.listdir("/proc/self/fd")
    writer = FileWriter.create(directory, "f", 4096)
    writer.abort()
    writer.abort()
    assert os.listdir("/proc/self/fd") == before


def test_directories_are_synced(directory: int) -> None:
    """EINVAL means that there is no such call (a pipe has none); anything else is an error."""
    sync_dir(directory)
    reader, writer = os.pipe()
    sync_dir(reader)
    os.close(reader)
    os.close(writer)
    with pytest.raises(OSError, match="Bad file descriptor"):
        sync_dir(writer)


def test_system_calls_on_what_has_none_of_them() -> None:
    """A pipe has no alignment, no space to reserve, no page cache."""
    reader, writer = os.pipe()
    try:
        assert direct_alignment(writer) == 4096
        fallocate(writer, 0)
        with pytest.raises(OSError, match="seek"):
            fallocate(writer, 1)
        start_writeback(writer, 0, 10)
        with pytest.raises(OSError, match="Bad file descriptor"):
            start_writeback(-1, 0, 10)
    finally:
        os.close(reader)
        os.close(writer)


def test_an_alignment_above_ours_means_buffered(directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are aligned to 4096; a disk with larger blocks gets them through the page cache."""
    monkeypatch.setattr(direct, "direct_alignment", lambda fd: 65536)
    fd = os.open("f", os.O_RDWR | os.O_CREAT, dir_fd=directory)
    assert not set_direct(fd)
    os.close(fd)
