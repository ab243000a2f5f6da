"""Opening a committed checkpoint for reading, so that retention leaves it alone until it is closed.

A reader holds a shared ``flock`` on the manifest from before it opens the first file. ``flock`` and not a record lock,
because one process has many readers, and because a forked child that holds it on only delays a removal.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import NoReturn, Self

import xxhash

from aiockpt.errors import CheckpointCorruptError, CheckpointError, ConfigError, StepNotFoundError
from aiockpt.format.image import Header
from aiockpt.format.manifest import Manifest, decode_manifest
from aiockpt.format.names import MANIFEST_NAME, parse_step
from aiockpt.storage.failures import NO_LOCKS, storage_error, storage_errors
from aiockpt.storage.faults import NO_FAULTS, Faults
from aiockpt.storage.file_reader import AlignedBuffer, FileReader

__all__ = ["OPEN_AT_ONCE", "AlignedBuffer", "FileReader", "OpenCheckpoint", "open_checkpoint"]

OPEN_AT_ONCE = 64
"""Files; those beyond are opened when they are first read, so that a large checkpoint needs no large limit."""
_LOCK_SECONDS = 10.0
"""Retention holds its lock for one rename."""
_POLL_SECONDS = 0.005
_MAX_MANIFEST_NBYTES = 2 << 30


class OpenCheckpoint:
    """A checkpoint that retention leaves alone while this is open; made by ``open_checkpoint``.

    Thread-safety: all methods but ``close`` may run in several threads.
    """

    path: str
    """Absolute."""
    manifest: Manifest
    manifest_nbytes: int
    manifest_sum: str
    """xxh3-128 of all its bytes: by these two other ranks know that they see the same one."""

    def __init__(self, path: str, faults: Faults) -> None:
        self.path = path
        self._faults = faults
        self._step = parse_step(os.path.basename(path))
        self._fds: list[int] = []
        self._files: dict[int, FileReader] = {}
        self._headers: dict[int, Header] = {}
        """Of files that were closed meanwhile."""
        self._lock = threading.Lock()

    def header(self, index: int) -> Header:
        """Return the checked header of file ``index`` of the manifest; errors as ``FileReader.header``."""
        header = self._headers.get(index)
        return self.file(index).header() if header is None else header

    def file(self, index: int) -> FileReader:
        """Return the reader of file ``index`` of the manifest; it is closed with the checkpoint.

        Raises:
            CheckpointCorruptError: The file is missing.
            StorageError: It cannot be opened.
        """
        with self._lock:
            reader = self._files.get(index)
            if reader is None:
                reader = self._files[index] = self._open_file(index)
            return reader

    def _open_file(self, index: int) -> FileReader:
        record = self.manifest.files[index]
        path = f"{self.path}/{record.path}"
        with self._missing_is_damage(path):
            fd = os.open(record.path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._fds[0])
        header = self._headers.get(index)
        return FileReader(fd, path, record, step=self.manifest.head.step, faults=self._faults, header=header)

    def close_file(self, index: int, *, keep_header: bool = False) -> None:
        """Close one file early, where there are many; ``file`` opens it again.

        Args:
            index: Of a file that no thread reads just now.
            keep_header: Whether its header, which was read, is needed once more.
        """
        if keep_header:
            self._headers[index] = self.header(index)
        with self._lock:
            reader = self._files.pop(index, None)
        if reader is not None:
            reader.close()

    def close(self) -> None:
        """Close all files and let go of the lock; harmless when it is closed already."""
        for index in list(self._files):
            self.close_file(index)
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        self._open_directory()
        self._read_manifest()
        for index in range(len(self.manifest.files)):
            self._check_file(index)

    def _read_manifest(self) -> None:
        file = f"{self.path}/{MANIFEST_NAME}"
        with self._missing_is_damage(file):
            manifest_fd = os.open(MANIFEST_NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._fds[0])
            self._fds.append(manifest_fd)
            _lock_shared(manifest_fd)
            if not os.path.samestat(os.stat(file), os.fstat(manifest_fd)):
                self._gone("it was replaced while it was being opened")
            size = os.fstat(manifest_fd).st_size
            if size > _MAX_MANIFEST_NBYTES:
                self._refuse(file, f"it has {size} bytes", 0)
            data = _read_all(manifest_fd, size)
        self.manifest_nbytes, self.manifest_sum = len(data), xxhash.xxh3_128_hexdigest(data)
        try:
            self.manifest = decode_manifest(data, file=file)
        except CheckpointCorruptError as exc:
            exc.step = self._step
            raise
        step = self.manifest.head.step
        if self._step not in (None, step):
            self._refuse(file, f"it is the manifest of step {step}", 0)
        self._step = step

    def _open_directory(self) -> None:
        try:
            self._fds.append(os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except FileNotFoundError:
            self._gone("the directory is not there")
        except NotADirectoryError as exc:
            raise ConfigError(
                f"{self.path} is no checkpoint",
                why="it is a file, or a part of its path is one",
                next="give the directory of a step",
                path=self.path,
            ) from exc
        except OSError as exc:
            raise storage_error("a checkpoint was not opened", exc, path=self.path) from exc

    def _check_file(self, index: int) -> None:
        record = self.manifest.files[index]
        path = f"{self.path}/{record.path}"
        with self._missing_is_damage(path):
            found = os.stat(record.path, dir_fd=self._fds[0]).st_size
        if found != record.nbytes:
            why = f"it has {found} bytes, the manifest says {record.nbytes}"
            self._refuse(path, why, min(found, record.nbytes), str(record.nbytes), str(found))
        if record.data_start and len(self._files) < OPEN_AT_ONCE:
            self.file(index)

    @contextlib.contextmanager
    def _missing_is_damage(self, path: str) -> Iterator[None]:
        """A file that is missing in a checkpoint that stands was lost; anything else that fails proves nothing."""
        try:
            yield
        except CheckpointError:
            raise
        except (FileNotFoundError, NotADirectoryError):
            if not self._stands():
                self._gone("it was removed while it was being read")
            self._refuse(path, "it is missing", None)
        except OSError as exc:
            raise storage_error("a checkpoint was not read", exc, path=path) from exc

    def _stands(self) -> bool:
        with storage_errors("a checkpoint was not read", self.path):
            try:
                return os.path.samestat(os.stat(self.path), os.fstat(self._fds[0]))
            except FileNotFoundError:
                return False

    def _gone(self, why: str) -> NoReturn:
        raise StepNotFoundError(
            f"there is no checkpoint {self.path}",
            why=why,
            next='list what there is with steps() or "aiockpt ls"',
            step=self._step,
            path=self.path,
        )

    def _refuse(
        self, file: str, why: str, offset: int | None, expected: str | None = None, found: str | None = None
    ) -> NoReturn:
        raise CheckpointCorruptError(
            f"{file} is damaged",
            why=why,
            next="restore another step",
            step=self._step,
            file=file,
            offset=offset,
            expected=expected,
            found=found,
        )


def open_checkpoint(path: str, *, faults: Faults = NO_FAULTS) -> OpenCheckpoint:
    """Open a checkpoint, read its manifest, and compare every file's size with it.

    Args:
        path: Of one step's directory.
        faults: Fault layer.

    Raises:
        StepNotFoundError: It is not there, or was removed meanwhile.
        CheckpointCorruptError: The manifest is not the one that was written, or a file is missing or has another size.
        ConfigError: It is of a newer format, or no directory.
        StorageError: Something cannot be read; that is no proof of corruption.
    """
    checkpoint = OpenCheckpoint(os.path.abspath(path), faults)
    try:
        checkpoint._open()
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def _lock_shared(fd: int) -> None:
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            threading.Event().wait(_POLL_SECONDS)
        except OSError as exc:
            if exc.errno not in NO_LOCKS:
                raise
            return  # retention cannot see us here; what is open can be read to its end
        else:
            return


def _read_all(fd: int, size: int) -> bytes:
    parts: list[bytes] = []
    offset = 0
    while offset < size and (part := os.pread(fd, size - offset, offset)):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)
