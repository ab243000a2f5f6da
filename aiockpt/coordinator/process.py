"""The worker's process as its parent sees it: start, last words, end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Iterator

import anyio

from aiockpt.errors import WorkerStartError
from aiockpt.process_ends import collect, collect_later, wait_channel
from aiockpt.worker.launch import command

__all__ = ["WorkerProcess"]

_log = logging.getLogger("aiockpt.worker")

_TAIL_LINES = 100
"""Kept for the error: a crash in native code says what it was first, then where each of a dozen threads stood."""
_LONGEST_LINE = 8 << 10


class WorkerProcess:
    """A child with its pidfd, our end of its socket, and the read end of its stderr."""

    def __init__(self, popen: subprocess.Popen[bytes], pidfd: int, sock: socket.socket, stderr: int) -> None:
        self._popen = popen
        self._stderr: int | None = stderr
        self.pid = popen.pid
        self.pidfd = pidfd
        self.socket = sock
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self.exit_status: int | None = None

    @classmethod
    def spawn(cls, faults: tuple[str, str] | None) -> WorkerProcess:
        """Start the child; blocks for the exec, so call it in a thread.

        ``subprocess`` and not ``anyio.open_process``: under uvloop that takes the program's SIGCHLD.

        Raises:
            WorkerStartError: The operating system refused.
        """
        with contextlib.ExitStack() as stack:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            stack.callback(ours.close)
            read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, read)
            with contextlib.ExitStack() as childs:
                childs.callback(theirs.close)
                childs.callback(os.close, write)
                try:
                    us = os.pidfd_open(os.getpid())
                    childs.callback(os.close, us)
                    with _signals_blocked():
                        popen = subprocess.Popen(
                            command(theirs.fileno(), us, faults=faults),
                            stdin=subprocess.DEVNULL,
                            stdout=subprocess.DEVNULL,
                            stderr=write,
                            pass_fds=(theirs.fileno(), us),
                            start_new_session=True,
                            cwd="/",
                        )
                    pidfd = os.pidfd_open(popen.pid)
                except OSError as exc:
                    raise WorkerStartError(
                        "the checkpoint worker was not started",
                        why=f"{exc.strerror} (errno {exc.errno})",
                        next="raise the limit that is named (processes, descriptors, memory) and open again",
                    ) from exc
            stack.pop_all()
            return cls(popen, pidfd, ours, read)

    async def pump_stderr(self) -> None:
        """Log the child's stderr line by line until its end."""
        rest = b""
        while self._stderr is not None:
            await anyio.wait_readable(self._stderr)
            try:
                data = os.read(self._stderr, 64 << 10)
            except BlockingIOError:
                continue
            *lines, rest = (rest + data).split(b"\n")
            if not data or len(rest) > _LONGEST_LINE:
                lines, rest = [*lines, rest], b""
            for line in filter(None, lines):
                text = line.decode("utf-8", "replace")
                self.tail.append(text)
                _log.warning("worker %d: %s", self.pid, text)
            if not data:
                return

    async def wait_dead(self) -> None:
        """Wait until the kernel reports the child's end."""
        await anyio.wait_readable(self.pidfd)

    def private_nbytes(self) -> int | None:
        """Return the bytes of memory that are the child's own, without the arena and the libraries, if they are known.

        Answered by the kernel from counters: unlike other files of /proc it waits for no lock of the child's.
        """
        try:
            with open(f"/proc/{self.pid}/statm", encoding="ascii") as file:
                _, resident, shared, *_ = map(int, file.read().split())
        except (OSError, ValueError):
            return None
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")

    def kill(self) -> None:
        """Send SIGKILL; harmless where the child is gone."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    async def reap(self, timeout: float) -> bool:
        """Wait for the end that was asked for and collect the exit status.

        Returns:
            False where the kernel could not end it in ``timeout`` seconds; it is named in the log and left.
        """
        with anyio.move_on_after(timeout, shield=True) as scope:
            await self.wait_dead()
        if scope.cancelled_caught:
            _log.warning(
                "worker %d is left behind\nwhy: it waits in the kernel (%s) and SIGKILL does not reach it\n"
                "next: look at the disk or file system of the run",
                self.pid,
                wait_channel(self.pid),
            )
            return False
        self.exit_status = collect(self._popen, self.pidfd)
        return True

    def reap_later(self) -> None:
        """Collect a worker that is left to finish alone, from a thread of its own, so that it is no zombie for ever.

        The pidfd becomes the thread's. The worker ends by itself, at the latest after its linger time.
        """
        pidfd, self.pidfd = self.pidfd, -1
        collect_later(self._popen, pidfd)

    def close(self) -> None:
        """Close pidfd and stderr; the socket is the link's."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
        if self._stderr is not None:
            os.close(self._stderr)
            self._stderr = None


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Let a child start with the signals blocked that it will ignore; it clears the mask itself once it does."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
