"""The guardian as its supervisor sees it: start, messages both ways, end."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from aiockpt.elastic.guardian.descendants import kill, marked
from aiockpt.elastic.guardian.wire import Frames, encode
from aiockpt.elastic.launching.interpreter import boot
from aiockpt.errors import CheckpointError
from aiockpt.process_ends import collect, collect_later
from aiockpt.worker.launch import PACKAGE_PATH, standard_library
from aiockpt.worker.spared import GUARDIAN_VARIABLE

__all__ = ["GuardianProcess"]

_log = logging.getLogger("aiockpt.elastic")

_SEND_SECONDS = 5.0
"""For the guardian to take one message in: it does nothing long, unless it is stopped."""
_ORPHANS_SECONDS = 2.0
"""For what a killed guardian leaves behind to end; who waits in the kernel is left."""
_LONGEST_SOCKET_PATH = 100
"""Bytes; ``sun_path`` holds 108."""


class GuardianProcess:
    """A guardian that runs: our end of its socket, and its pidfd.

    Closing the socket is enough to end it, with all that descends from it, so a release needs no wait.

    Attributes:
        pid: Its process id.
        directory: A private one, which goes when the guardian goes.
        socket_path: Where a checkpoint worker with a staged save in hand asks to be spared.
    """

    def __init__(self, popen: subprocess.Popen[bytes], control: socket.socket, directory: Path) -> None:
        self._popen = popen
        self._control = control
        self.directory = directory
        self._frames = Frames()
        self._sending = anyio.Lock()
        self._pidfd: int | None = os.pidfd_open(popen.pid)
        self.pid = popen.pid
        self.socket_path = directory / "socket"

    @classmethod
    async def start(cls, limiter: anyio.CapacityLimiter) -> GuardianProcess:
        """Start a guardian, in a thread for the exec.

        Raises:
            CheckpointError: The operating system refused.
        """
        return cls(*await anyio.to_thread.run_sync(_spawn, limiter=limiter))

    async def send(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send one message, and copies of descriptors with it.

        Raises:
            OSError: The guardian is gone, or has not taken it in time.

        Cancellation: a message that was begun is not finished, and the guardian understands none that follows.
        """
        data = memoryview(encode(message))
        with anyio.fail_after(_SEND_SECONDS):
            async with self._sending:
                await self._send(data, descriptors)

    async def _send(self, data: memoryview, descriptors: Sequence[int]) -> None:
        while data:
            try:
                sent = socket.send_fds(self._control, [data], descriptors, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                await anyio.wait_writable(self._control)
                continue
            data, descriptors = data[sent:], ()

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Yield what the guardian reports, until it is gone."""
        while True:
            await anyio.wait_readable(self._control)
            try:
                data = self._control.recv(1 << 16)
            except BlockingIOError:
                continue
            except OSError:
                return
            if not data:
                return
            for event in self._frames.feed(data):
                yield event

    def kill_all(self) -> None:
        """Kill the guardian, and all that it had started, known by its name in their environment. Blocks for 2 s."""
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        deadline = time.monotonic() + _ORPHANS_SECONDS
        while (found := marked(GUARDIAN_VARIABLE, str(self.socket_path))) and time.monotonic() < deadline:
            for pid, parent in found.items():
                kill(pid, parent)

    async def wait_ended(self) -> None:
        """Wait until the guardian's process has ended; it keeps its exit status for ``close``."""
        if self._pidfd is not None:
            await anyio.wait_readable(self._pidfd)

    def close(self) -> None:
        """Let go of the guardian, and collect it; a living one ends all its descendants first, then itself."""
        self._control.close()
        if self._pidfd is None:
            return
        pidfd, self._pidfd = self._pidfd, None
        if select.select([pidfd], [], [], 0)[0]:
            collect(self._popen, pidfd)
            os.close(pidfd)
            shutil.rmtree(self.directory, ignore_errors=True)  # a guardian that was killed has left it
        else:
            collect_later(self._popen, pidfd)


def _spawn() -> tuple[subprocess.Popen[bytes], socket.socket, Path]:
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as theirs:
        try:
            directory = _private_directory()
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            listener = theirs.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(os.fspath(directory / "socket"))
            listener.listen(64)
            ours, control = socket.socketpair()
            theirs.enter_context(control)
            stack.callback(ours.close)
            us = os.pidfd_open(os.getpid())
            theirs.callback(os.close, us)
            inherited = control.fileno(), us, listener.fileno()
            # Isolated and without site packages: no file of the user's can shadow a module, and none is waited for.
            path = [*standard_library(), os.path.dirname(PACKAGE_PATH)]
            command = boot("aiockpt.elastic.guardian.main", "-I", "-S", path=path)
            popen = subprocess.Popen(
                [*command, *map(str, inherited), str(directory / "socket")],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=inherited,
                start_new_session=True,
            )
        except OSError as exc:
            raise CheckpointError(
                "no process was started: the guardian that was to launch them could not be",
                why=f"{exc.strerror} (errno {exc.errno})",
                next="raise the limit that is named (processes, descriptors, memory) and start again",
            ) from exc
        ours.setblocking(False)
        stack.pop_all()
        return popen, ours, directory


def _private_directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="aiockpt-guardian-"))
    if len(os.fsencode(directory / "socket")) > _LONGEST_SOCKET_PATH:
        directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix="aiockpt-guardian-", dir="/tmp"))
    return directory
