"""The run directory as one worker has it open."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading

from aiockpt.format.names import trash_name
from aiockpt.storage.failures import storage_errors
from aiockpt.storage.locks import AttemptLock
from aiockpt.storage.run_directory import open_run

__all__ = ["Run"]


class Run:
    """Descriptor, term and lock of the run, kept while the process lives; nothing but ``open`` works before it."""

    def __init__(self, path: str, term: int) -> None:
        self.path = path
        self.term = term
        self.fd = -1
        self._lock: AttemptLock | None = None
        self._guard = threading.Lock()
        self._attempts = 0

    def open(self) -> None:
        """Open the directory that the trainer took, and make sure that files can be made in it. Blocks.

        Raises:
            ConfigError: It is not there, or is no directory.
            StorageError: It cannot be written.
        """
        fd = open_run(self.path)
        try:
            with storage_errors("a run directory cannot be written", self.path):
                # By doing it: neither modes nor access() know about read-only mounts, quotas or root squashing.
                probe = trash_name(f"probe.{secrets.token_hex(8)}")
                os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=fd))
                os.unlink(probe, dir_fd=fd)
                self._lock = AttemptLock(fd)
        except BaseException:
            os.close(fd)
            raise
        self.fd = fd

    @property
    def is_gone(self) -> bool:
        """Whether the directory itself was removed."""
        return os.fstat(self.fd).st_nlink == 0

    @property
    def free_nbytes(self) -> int:
        """Bytes that this user may still write."""
        status = os.fstatvfs(self.fd)
        return status.f_bavail * status.f_frsize

    def holds(self, name: str) -> bool:
        """Tell whether something of this name stands in the run."""
        return os.access(name, os.F_OK, dir_fd=self.fd, follow_symlinks=False)

    def open_attempt(self) -> None:
        """Say to other jobs that this worker has an attempt open; once for each attempt.

        Raises:
            StorageError: The file system has no locks.
        """
        with self._guard, storage_errors("a run was not locked", self.path):
            if not self._attempts:
                assert self._lock is not None, "the run is open"
                self._lock.acquire()
            self._attempts += 1

    def close_attempt(self) -> None:
        """Say that an attempt is no longer open."""
        with self._guard:
            self._attempts -= 1
            if not self._attempts and self._lock is not None:
                with contextlib.suppress(OSError):  # the process's end does it too
                    self._lock.release()
