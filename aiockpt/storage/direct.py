"""Writing one file past the page cache, and making it durable.

A file is created, sized, then written from any thread at any aligned offset, then cut to its exact size and synced, all
by one descriptor: after a failed writeback Linux marks the pages clean, and another descriptor's sync would succeed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading

from aiockpt.format.image import ALIGN, round_up
from aiockpt.storage.failures import path_of, storage_error, storage_errors
from aiockpt.storage.faults import NO_FAULTS, FaultPoint, Faults
from aiockpt.storage.system_calls import direct_alignment, fallocate, start_writeback

__all__ = ["FileWriter", "set_direct", "sync_dir", "write_small"]

_MODE = 0o666  # the user's umask decides


class FileWriter:
    """One new file of known size.

    Thread-safety: ``write`` may run in several threads for different ranges; ``finish`` and ``abort`` only when no
    ``write`` runs.
    """

    def __init__(self, fd: int, name: str, nbytes: int, *, buffered: bool, preallocated: bool, faults: Faults) -> None:
        self.name = name
        self.nbytes = nbytes
        self.buffered = buffered
        """Whether direct I/O was refused; it may become true at a write."""
        self.preallocated = preallocated
        """Whether the file system reserved the space, so that a full disk was found before the first write."""
        self._fd = fd
        self._faults = faults
        self._falling_back = threading.Lock()

    @classmethod
    def create(cls, dir_fd: int, name: str, nbytes: int, *, faults: Faults = NO_FAULTS) -> FileWriter:
        """Make the file, which must not exist, and reserve its space.

        Args:
            dir_fd: Directory that ``name`` is relative to.
            name: May have folders in it, which stand already.
            nbytes: Exact size that ``finish`` leaves.
            faults: Fault layer.

        Raises:
            StorageError: With needed and free bytes where there is no space.
        """
        with storage_errors("a file was not created", name, fd=dir_fd):
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE, dir_fd=dir_fd)
        try:
            with storage_errors("a file was not opened for direct I/O", name, fd=dir_fd):
                buffered = not set_direct(fd, name, faults)
            # Rounded up, so that the padded tail does not extend the file: such a write would run alone.
            preallocated = _reserve(fd, round_up(nbytes), faults, name)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, name, nbytes, buffered=buffered, preallocated=preallocated, faults=faults)

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of ``view`` at ``offset``.

        Args:
            view: Aligned memory. Its length is a multiple of 4096 (the tail padded up to it) unless ``buffered``.
            offset: Bytes from the start of the file, a multiple of 4096.

        Raises:
            StorageError: The range is undefined then, and the file may not be used.
        """
        with storage_errors("a write failed", "", fd=self._fd):
            done = 0
            while done < len(view):
                done += self._write_some(view[done:], offset + done)
            if self.buffered:
                start_writeback(self._fd, offset, done)

    def _write_some(self, view: memoryview, offset: int) -> int:
        direct = not self.buffered
        try:
            self._faults.at(FaultPoint.WORKER_BLOCK_WRITE, self.name)
            return _write_clipped(self._fd, view, offset, self.name, self._faults)
        except OSError as exc:
            if exc.errno != errno.EINVAL or not direct:
                raise
        self._fall_back()
        return _pwrite(self._fd, view, offset)

    def _fall_back(self) -> None:
        with self._falling_back:
            if not self.buffered:
                fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_DIRECT)
                self.buffered = True

    def finish(self) -> None:
        """Cut the file to its exact size, make its bytes and size durable, close it.

        Raises:
            StorageError: The file may not be used, and a second sync proves nothing.
        """
        try:
            with storage_errors("a file was not synced", "", fd=self._fd):
                self._faults.at(FaultPoint.WORKER_FILE_SYNC, self.name)
                os.ftruncate(self._fd, self.nbytes)
                os.fdatasync(self._fd)
        finally:
            self.abort()

    def abort(self) -> None:
        """Close the file as it is; harmless when it is closed already."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # What close could report concerns bytes that are durable already, or that nobody will use.
            with contextlib.suppress(OSError):
                os.close(fd)


def write_small(
    dir_fd: int,
    name: str,
    data: bytes,
    *,
    point: FaultPoint = FaultPoint.WORKER_MANIFEST_WRITE,
    faults: Faults = NO_FAULTS,
) -> None:
    """Create a file with ``data`` through the page cache, and make it durable.

    Raises:
        StorageError: The file may stand with less.
    """
    with storage_errors("a file was not written", name, fd=dir_fd):
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE, dir_fd=dir_fd)
        try:
            faults.at(point, name)
            view, done = memoryview(data), 0
            while done < len(data):
                done += _write_clipped(fd, view[done:], done, name, faults)
            os.fdatasync(fd)
        finally:
            os.close(fd)


def sync_dir(fd: int) -> None:
    """Make the entries of a directory durable.

    Raises:
        OSError: Not for EINVAL, with which some file systems say that they have no such call.
    """
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise


def set_direct(fd: int, name: str = "", faults: Faults = NO_FAULTS) -> bool:
    """Switch an open file to direct I/O; False where it has none, or needs an alignment above 4096.

    By ``F_SETFL`` and not at open, because an open that creates the file may fail and leave it behind.
    """
    try:
        faults.at(FaultPoint.WORKER_OPEN_DIRECT, name)
        if direct_alignment(fd) > ALIGN:
            return False
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return False
    return True


def _write_clipped(fd: int, view: memoryview, offset: int, name: str, faults: Faults) -> int:
    want = faults.clip(name, offset, len(view))
    written = _pwrite(fd, view[:want], offset)
    if want < len(view):
        faults.at(FaultPoint.WORKER_TORN, name)
    return written


def _pwrite(fd: int, view: memoryview, offset: int) -> int:
    written = os.pwrite(fd, view, offset)
    if not written and len(view):
        raise OSError(errno.EIO, "the file system took no byte and gave no error")
    return written


def _reserve(fd: int, nbytes: int, faults: Faults, name: str) -> bool:
    try:
        faults.at(FaultPoint.WORKER_PREALLOCATE, name)
        fallocate(fd, nbytes)
    except OSError as exc:
        if exc.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        status = os.fstatvfs(fd)
        why = f"the file needs {nbytes} bytes, {status.f_bavail * status.f_frsize} are free"
        raise storage_error("a file got no space", exc, path=path_of(fd), why=why) from exc
    return True
