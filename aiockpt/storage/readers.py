"""Reading a committed checkpoint: every byte that is handed out was checked against its checksum.

A reader holds a shared ``flock`` on the manifest from before the first file is opened until it is closed, so that
retention leaves the checkpoint alone. ``flock`` and not a record lock, because one process has many readers.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import threading
import time
from types import TracebackType
from typing import NoReturn, Self

import xxhash

from aiockpt.errors import CheckpointCorruptError, ConfigError, StepNotFoundError
from aiockpt.format.image import ALIGN, Header, parse_header, round_up
from aiockpt.format.manifest import FileRecord, Manifest, decode_manifest
from aiockpt.format.names import MANIFEST_NAME, parse_step
from aiockpt.storage.direct import set_direct
from aiockpt.storage.failures import storage_error, storage_errors

__all__ = ["AlignedBuffer", "FileReader", "OpenCheckpoint", "open_checkpoint"]

_OPEN_AT_ONCE = 64
"""Descriptors; files beyond these are opened when they are first read."""
_LOCK_SECONDS = 10.0
"""Retention holds its lock for one rename."""
_MAX_BLOCK_NBYTES = 1 << 30
_MAX_MANIFEST_NBYTES = 4 << 30


class AlignedBuffer:
    """Page-aligned private memory that direct I/O reads into; freed when the last view of it is gone."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = round_up(max(nbytes, 1))
        self.view = memoryview(mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class FileReader:
    """One file of a checkpoint.

    Thread-safety: all methods may run in several threads, each with a buffer of its own.
    """

    def __init__(self, fd: int, path: str, record: FileRecord, step: int | None) -> None:
        self.path = path
        self.record = record
        self.buffered = not set_direct(fd)
        """Whether direct I/O was refused; it may become true at a read."""
        self._fd = fd
        self._step = step
        self._falling_back = threading.Lock()
        self._header: Header | None = None

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return self.record.nbytes

    def header(self) -> Header:
        """Read the header and check it against the manifest; read once.

        Raises:
            CheckpointCorruptError: It is not the one that was written.
            StorageError: It cannot be read.
        """
        if self._header is None:
            record = self.record
            data = self._checked(record.data_start)
            try:
                header = parse_header(data, file=self.path, file_nbytes=record.nbytes)
            except CheckpointCorruptError as exc:
                exc.step = self._step
                raise
            if header.data_start != record.data_start:
                self._refuse(f"its header ends at {header.data_start}, the manifest says {record.data_start}", 0)
            if header.sums and not (header.block_nbytes % ALIGN == 0 and header.block_nbytes <= _MAX_BLOCK_NBYTES):
                self._refuse(f"its blocks have {header.block_nbytes} bytes", 0)
            if record.nbytes > record.data_start and not header.sums:
                self._refuse("its header has no checksums", 0)
            self._header = header
        return self._header

    def content(self) -> bytes:
        """Read a plain file and check it against the manifest.

        Raises:
            CheckpointCorruptError: It is not the one that was written.
            StorageError: It cannot be read.
        """
        return self._checked(self.record.nbytes)

    @property
    def block_count(self) -> int:
        """Blocks of the data section; reads the header."""
        return len(self.header().sums)

    @property
    def block_nbytes(self) -> int:
        """Bytes of every block but the last, which may have fewer; 0 where there is none. Reads the header."""
        return self.header().block_nbytes

    def block_range(self, index: int) -> tuple[int, int]:
        """Return where block ``index`` lies, ``[start, stop)`` in bytes of the file; reads the header."""
        header = self.header()
        start = header.data_start + index * header.block_nbytes
        return start, min(start + header.block_nbytes, self.record.nbytes)

    def read_block(self, index: int, buffer: AlignedBuffer) -> memoryview:
        """Read one block and check it.

        Args:
            index: From 0 to ``block_count`` - 1.
            buffer: At least the block rounded up to 4096 bytes; overwritten.

        Returns:
            The block's bytes, in ``buffer``.

        Raises:
            CheckpointCorruptError: The bytes are not those that were written.
            StorageError: They cannot be read.
        """
        header = self.header()
        start, stop = self.block_range(index)
        view = self._read(start, stop - start, buffer)
        found = xxhash.xxh3_64_intdigest(view)
        if found != header.sums[index]:
            self._refuse("a block's checksum does not fit", start, f"{header.sums[index]:016x}", f"{found:016x}")
        return view

    def _checked(self, nbytes: int) -> bytes:
        data = bytes(self._read(0, nbytes, AlignedBuffer(nbytes)))
        found = xxhash.xxh3_128_hexdigest(data)
        if found != self.record.sum:
            self._refuse("the checksum in the manifest does not fit", 0, self.record.sum, found)
        return data

    def _read(self, offset: int, nbytes: int, buffer: AlignedBuffer) -> memoryview:
        done = 0
        with storage_errors("a file was not read", self.path):
            while done < nbytes:
                # Past the end of the file a direct read returns what there is, so the tail needs no other way.
                count = self._read_some(buffer.view[done : round_up(nbytes)], offset + done)
                if not count:
                    self._refuse("it is shorter than when it was opened", offset + done, str(nbytes), str(done))
                done += count
        return buffer.view[:nbytes]

    def _read_some(self, view: memoryview, offset: int) -> int:
        direct = not self.buffered
        try:
            return os.preadv(self._fd, [view], offset)
        except OSError as exc:
            if exc.errno != errno.EINVAL or not direct:
                raise
        with self._falling_back:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_DIRECT)
            self.buffered = True
        return os.preadv(self._fd, [view], offset)

    def _refuse(self, why: str, offset: int, expected: str | None = None, found: str | None = None) -> NoReturn:
        raise CheckpointCorruptError(
            f"{self.path} is damaged at byte {offset}",
            why=why if expected is None else f"{why}: expected {expected}, found {found}",
            next="restore another step",
            step=self._step,
            file=self.path,
            offset=offset,
            expected=expected,
            found=found,
        )

    def close(self) -> None:
        """Close the file; harmless when it is closed already."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class OpenCheckpoint:
    """A checkpoint that retention leaves alone while this is open; made by ``open_checkpoint``.

    Thread-safety: ``file`` and ``header`` may be called from several threads.
    """

    def __init__(self, path: str, dir_fd: int, manifest_fd: int, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._dir_fd = dir_fd
        self._manifest_fd = manifest_fd
        self._files: dict[int, FileReader] = {}
        self._opening = threading.Lock()

    def header(self, index: int) -> Header:
        """Return the checked header of file ``index``; errors as ``FileReader.header``."""
        return self.file(index).header()

    def file(self, index: int) -> FileReader:
        """Return the reader of file ``index`` of the manifest; it is closed with the checkpoint.

        Raises:
            CheckpointCorruptError: The file is missing.
            StorageError: It cannot be opened.
        """
        with self._opening:
            reader = self._files.get(index)
            if reader is None:
                record = self.manifest.files[index]
                path = f"{self.path}/{record.path}"
                with _missing_is_corrupt(self.path, path, self.manifest.head.step):
                    fd = os.open(record.path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._dir_fd)
                reader = self._files[index] = FileReader(fd, path, record, self.manifest.head.step)
            return reader

    def close_file(self, index: int) -> None:
        """Close one file early, where there are many; ``file`` opens it again."""
        with self._opening:
            reader = self._files.pop(index, None)
        if reader is not None:
            reader.close()

    def close(self) -> None:
        """Close all files and let go of the lock; harmless when it is closed already."""
        for index in list(self._files):
            self.close_file(index)
        fds, self._dir_fd, self._manifest_fd = (self._dir_fd, self._manifest_fd), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check_sizes(self) -> None:
        """Compare every file's size with the manifest, and open the first of them."""
        step = self.manifest.head.step
        for index, record in enumerate(self.manifest.files):
            path = f"{self.path}/{record.path}"
            with _missing_is_corrupt(self.path, path, step):
                found = os.stat(record.path, dir_fd=self._dir_fd).st_size
            if found != record.nbytes:
                raise CheckpointCorruptError(
                    f"{path} has {found} bytes, the manifest says {record.nbytes}",
                    why="the file was cut or changed after the commit",
                    next="restore another step",
                    step=step,
                    file=path,
                    offset=min(found, record.nbytes),
                    expected=str(record.nbytes),
                    found=str(found),
                )
            if index < _OPEN_AT_ONCE and record.data_start:
                self.file(index)


def open_checkpoint(path: str) -> OpenCheckpoint:
    """Open a checkpoint, read its manifest, and compare every file's size with it.

    Args:
        path: Of one step's directory.

    Raises:
        StepNotFoundError: It is not there, or was removed meanwhile.
        CheckpointCorruptError: The manifest is not the one that was written, or a file is missing or has another size.
        ConfigError: It is of a newer format.
        StorageError: Something cannot be read; that is no proof of corruption.
    """
    path = os.path.abspath(path)
    step = parse_step(os.path.basename(path))
    with contextlib.ExitStack() as undo:
        try:
            dir_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as exc:
            raise _gone(path, step, "the directory is not there") from exc
        except NotADirectoryError as exc:
            raise ConfigError(
                f"{path} is no checkpoint", why="it is no directory", next="give a step's directory", path=path
            ) from exc
        except OSError as exc:
            raise storage_error("a checkpoint was not opened", exc, path=path) from exc
        undo.callback(os.close, dir_fd)
        name = f"{path}/{MANIFEST_NAME}"
        with _missing_is_corrupt(path, name, step):
            manifest_fd = os.open(MANIFEST_NAME, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dir_fd)
            undo.callback(os.close, manifest_fd)
            _lock_shared(manifest_fd, path, step)
            data = _read_all(manifest_fd)
        try:
            manifest = decode_manifest(data, file=name)
        except CheckpointCorruptError as exc:
            exc.step = step
            raise
        checkpoint = OpenCheckpoint(path, dir_fd, manifest_fd, manifest)
        undo.pop_all()
    try:
        checkpoint.check_sizes()
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def _lock_shared(fd: int, path: str, step: int | None) -> None:
    deadline = time.monotonic() + _LOCK_SECONDS
    pause = threading.Event()
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            pause.wait(0.005)
        except OSError as exc:
            if exc.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            break  # no locks here: retention cannot see readers, and these hold what they opened
    try:
        standing = os.stat(f"{path}/{MANIFEST_NAME}")
    except FileNotFoundError as exc:
        raise _gone(path, step, "it was removed while it was being opened") from exc
    opened = os.fstat(fd)
    if (standing.st_dev, standing.st_ino) != (opened.st_dev, opened.st_ino):
        raise _gone(path, step, "it was replaced while it was being opened")


def _read_all(fd: int) -> bytes:
    size = os.fstat(fd).st_size
    parts, offset = [], 0
    while offset < size:
        part = os.pread(fd, size - offset, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def _gone(path: str, step: int | None, why: str) -> StepNotFoundError:
    return StepNotFoundError(
        f"there is no checkpoint {path}", why=why, next='list them with steps() or "aiockpt ls"', step=step, path=path
    )


@contextlib.contextmanager
def _missing_is_corrupt(checkpoint: str, path: str, step: int | None):  # type: ignore[no-untyped-def]
    try:
        with storage_errors("a checkpoint was not read", path):
            yield
    except CheckpointCorruptError:
        raise
    except OSError as exc:
        if exc.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise
        if not os.path.lexists(checkpoint):
            raise _gone(checkpoint, step, "it was removed while it was being read") from exc
        raise CheckpointCorruptError(
            f"{path} is missing",
            why="it was removed after the commit, or never belonged to a checkpoint",
            next="restore another step",
            step=step,
            file=path,
        ) from exc
