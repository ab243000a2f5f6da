"""The locks of a run: byte 0 of ``.lock`` is the run, byte 1 the open attempts.

POSIX record locks, because flock and open-file-description locks outlive a killed owner in its forked children
(measured). Their price: they do not exclude their own process, and closing *any* descriptor of the file drops them.
So a table of the runs open in this process is asked first, the file is opened once and kept, and nothing else in the
process opens it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Callable

import msgspec

from aiockpt.errors import ConfigError
from aiockpt.format.names import LOCK_NAME

__all__ = ["AttemptLock", "Owner", "RunLock"]

_RUN_BYTE = 0
_ATTEMPT_BYTE = 1
_POLL_SECONDS = 0.02
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid

_open_runs: dict[tuple[int, int], RunLock] = {}


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds a run; for the message, the lock decides."""

    host: str
    boot_id: str
    pid: int
    start_time: int
    """Of the process, in ticks since boot: with ``pid`` and ``boot_id`` it names one process for ever."""
    run_id: str
    since: str
    """UTC, ISO 8601."""


class RunLock:
    """Byte 0: this process writes the run; made by ``take``."""

    def __init__(self, fd: int, key: tuple[int, int], run: str) -> None:
        self.run = run
        self._fd = fd
        self._key = key
        self._pid = os.getpid()

    @classmethod
    def take(cls, run_fd: int, run: str, *, timeout: float, on_wait: Callable[[str], None] | None = None) -> RunLock:
        """Take the run for this process.

        Args:
            run_fd: The run directory.
            run: Its path, for messages.
            timeout: Seconds to wait for another process: a killed one loses its locks after its memory is gone.
            on_wait: Called at each turn of waiting with what is waited for; what it raises ends the wait.

        Raises:
            ConfigError: This process or another one has the run.
            OSError: The lock file cannot be made, or the file system has no locks.
        """
        status = os.fstat(run_fd)
        lock = cls(-1, (status.st_dev, status.st_ino), run)
        if _open_runs.setdefault(lock._key, lock) is not lock:
            raise _taken(run, "this process has it open already", "close the other Checkpointer first")
        try:
            lock._fd = _open_lock(run_fd)
            lock._lock(time.monotonic() + timeout, timeout, on_wait)
        except BaseException:
            lock.release()
            raise
        return lock

    def _lock(self, deadline: float, timeout: float, on_wait: Callable[[str], None] | None) -> None:
        while True:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _RUN_BYTE)
                return
            except (BlockingIOError, PermissionError) as exc:  # POSIX allows EAGAIN and EACCES
                if time.monotonic() >= deadline:
                    raise _held_by(self.run, self.owner(), timeout) from exc
            if on_wait is not None:
                on_wait(f"the run {self.run} is held by another process")
            threading.Event().wait(_POLL_SECONDS)

    def write_owner(self, run_id: str, since: str) -> None:
        """Write who holds the run, for the message that another job shows.

        Raises:
            OSError: As the file system says.
        """
        owner = Owner(
            host=socket.gethostname(),
            boot_id=_boot_id(),
            pid=os.getpid(),
            start_time=_start_time(),
            run_id=run_id,
            since=since,
        )
        data = msgspec.json.encode(owner) + b"\n"
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, data, 0)

    def owner(self) -> Owner | None:
        """Return who wrote the record last; None where there is none that can be read."""
        try:
            return msgspec.json.decode(os.pread(self._fd, 4096, 0), type=Owner)
        except (OSError, msgspec.DecodeError):
            return None

    def wait_attempts(self, timeout: float | None, on_wait: Callable[[str], None] | None = None) -> bool:
        """Wait until no worker of another job has an attempt open.

        Args:
            timeout: Seconds; None is no limit.
            on_wait: Called at each turn of waiting with what is waited for; what it raises ends the wait.

        Returns:
            False where one still has after ``timeout``.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._attempts_open():
            if deadline is not None and time.monotonic() >= deadline:
                return False
            if on_wait is not None:
                on_wait(f"a former job's worker finishes its save in {self.run}")
            threading.Event().wait(_POLL_SECONDS)
        return True

    def _attempts_open(self) -> bool:
        # Asked, not taken: a worker that takes its shared lock meanwhile must not be refused.
        question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _ATTEMPT_BYTE, 1, 0)
        kind = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_GETLK, question))[0]
        return bool(kind != fcntl.F_UNLCK)

    def release(self) -> None:
        """Let go of the run; harmless when it was released, and in a forked child, which has nothing to release."""
        if self._pid != os.getpid():
            return
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if _open_runs.get(self._key) is self:
            del _open_runs[self._key]

    def forget_in_child(self) -> None:
        """Close the copy that a forked child has; the parent's lock stands, and so does its entry in the table."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        _open_runs.pop(self._key, None)


class AttemptLock:
    """Byte 1, shared: this worker has an attempt open. One for each worker process, kept while it lives."""

    def __init__(self, run_fd: int) -> None:
        self._fd = _open_lock(run_fd)

    def acquire(self) -> None:
        """Say that an attempt is open.

        Raises:
            OSError: The file system has no locks.
        """
        fcntl.lockf(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, _ATTEMPT_BYTE)

    def release(self) -> None:
        """Say that no attempt is open."""
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, _ATTEMPT_BYTE)

    def close(self) -> None:
        """Close the file, which releases too; harmless when it is closed already."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _open_lock(run_fd: int) -> int:
    # No link is followed: the owner's record is written into this file, whoever made the name.
    return os.open(LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666, dir_fd=run_fd)


def _taken(run: str, why: str, next: str) -> ConfigError:
    return ConfigError(f"the run {run} was not opened: it is taken", why=why, next=next, argument="run", path=run)


def _held_by(run: str, owner: Owner | None, timeout: float) -> ConfigError:
    if owner is None:
        who = "a process that left no record"
    else:
        who = f"process {owner.pid} on host {owner.host} (since {owner.since})"
    return _taken(run, f"{who} holds it, and did so for {timeout:g} s", "end that job, or choose another run directory")


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _start_time() -> int:
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[19])
