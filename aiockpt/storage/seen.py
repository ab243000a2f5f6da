"""Opening the very checkpoint that another rank has opened and checked, on a host that may see it late.

Missing, shorter or other bytes prove nothing here: a network file system may serve what it saw before, and the
directory may not be the same one at all. Only checksums of what is read from it are proof of damage.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from aiockpt.errors import CheckpointCorruptError, RestoreError, StepNotFoundError, StorageError
from aiockpt.storage.faults import NO_FAULTS, Faults
from aiockpt.storage.file_reader import FileReader
from aiockpt.storage.readers import OpenCheckpoint

__all__ = ["Seen", "open_seen"]

PATIENCE_SECONDS = 60.0
"""Longest time for which NFS keeps attributes, and names that were not there (acregmax, acdirmax)."""
PAUSES = 0.02, 1.0
"""Seconds between two looks: the first, doubled each time, up to the second."""

T = TypeVar("T")


class Seen(NamedTuple):
    """What a rank that has opened a checkpoint says of it."""

    step: int
    save_id: str
    manifest_nbytes: int
    manifest_sum: str


class _SeenCheckpoint(OpenCheckpoint):
    def __init__(self, path: str, seen: Seen, faults: Faults, should_stop: Callable[[], bool]) -> None:
        super().__init__(path, faults)
        self._seen = seen
        self._should_stop = should_stop

    def _open(self) -> None:
        self._patiently(self._open_once, f"{self.path} is not what rank 0 sees there")

    def _open_once(self) -> None:
        self.close()
        self._open_directory()
        self._read_manifest()
        found = self.manifest_nbytes, self.manifest_sum
        expected = self._seen.manifest_nbytes, self._seen.manifest_sum
        if found != expected:
            self._refuse(
                f"{self.path}/manifest.json",
                "it has {} bytes of checksum {}, that of rank 0 {} of {}".format(*found, *expected),
                0,
            )

    def _open_file(self, index: int) -> FileReader:
        path = f"{self.path}/{self.manifest.files[index].path}"
        return self._patiently(lambda: self._open_file_once(index, path), f"{path} is not what rank 0 sees there")

    def _open_file_once(self, index: int, path: str) -> FileReader:
        reader = super()._open_file(index)
        found = os.fstat(reader.fileno()).st_size
        if found != reader.nbytes:
            reader.close()
            self._refuse(path, f"it has {found} bytes, the manifest says {reader.nbytes}", min(found, reader.nbytes))
        return reader

    def _patiently(self, look: Callable[[], T], what: str) -> T:
        deadline = time.monotonic() + PATIENCE_SECONDS
        pause, longest = PAUSES
        while True:
            try:
                return look()
            except (StepNotFoundError, CheckpointCorruptError) as exc:
                error: StepNotFoundError | CheckpointCorruptError | StorageError = exc
            except StorageError as exc:
                if exc.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
                error = exc
            if time.monotonic() >= deadline:
                raise StorageError(
                    what,
                    why=f"for {PATIENCE_SECONDS:g} s: {error.why}",
                    next="check that the run directory is the same one, on a shared file system, on all hosts",
                    errno=getattr(error, "errno", None) or errno.ESTALE,
                    path=self.path,
                    step=self._seen.step,
                ) from error
            if self._should_stop():
                raise RestoreError("the restore was cancelled", why="its caller asked for it", next="restore again")
            threading.Event().wait(pause)
            pause = min(2 * pause, longest)
            self._look_anew()

    def _look_anew(self) -> None:
        """Open the directory once more, behind the same descriptor: a network file system then asks its server."""
        if not self._fds:
            return
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return  # the next look says why
        try:
            os.dup2(fd, self._fds[0], inheritable=False)
        finally:
            os.close(fd)


def open_seen(path: str, seen: Seen, *, should_stop: Callable[[], bool], faults: Faults = NO_FAULTS) -> OpenCheckpoint:
    """Open the checkpoint that another rank has opened; what is not there yet, or is another one, is waited for.

    Files are opened when they are first read, and compared with the manifest then.

    Args:
        path: Of the step's directory on this host.
        seen: What the other rank found there.
        should_stop: Asked while waiting.
        faults: Fault layer.

    Raises:
        StorageError: It cannot be read, or for a minute it was not there or another one; that is no proof of
            corruption.
        ConfigError: It is no directory.
        RestoreError: ``should_stop`` said so.
    """
    checkpoint = _SeenCheckpoint(os.path.abspath(path), seen, faults, should_stop)
    try:
        checkpoint._open()
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint
