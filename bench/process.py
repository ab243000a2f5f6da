"""The parent's hold on the process of one system."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

__all__ = ["Entrant", "EntrantFailedError", "EntrantProcess"]

_ANSWER_TIMEOUT = 900.0
"""Seconds for one answer: a peer that hangs is skipped, the others are measured."""
_LAST_WORDS = 300
_OUT_OF_DESCRIPTORS = ("Too many open files", "ancdata")
"""What Python and multiprocessing say then; the second of descriptors that were sent and could not be received."""


class EntrantFailedError(Exception):
    """The process died, hung, or raised; the text says why in one line."""


class Entrant(Protocol):
    """A system that is up, in one process or in several; a context manager that leaves none behind."""

    @property
    def pid(self) -> int:
        """The process whose tree is looked at."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None: ...

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and wait for its answer."""

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer."""

    def close(self) -> None:
        """Let the system close, and its process end."""


class EntrantProcess:
    """Runs one system in a process of its own; a context manager that leaves no process behind.

    Args:
        arguments: Options of the module's command line, by name; those that are None are left out.
        module: Answers on the descriptor ``--reply-fd``, one JSON line for each line that it reads from its standard
            input, and one before that.
    """

    def __init__(self, arguments: Mapping[str, object], *, module: str = "bench.child") -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        reading, writing = os.pipe()
        self._replies = os.fdopen(reading, "rb", buffering=0)
        given = {name: value for name, value in arguments.items() if value is not None}
        command = [sys.executable, "-m", module, "--reply-fd", str(writing)]
        command += [text for name, value in given.items() for text in (f"--{name}", str(value))]
        try:
            # A session of its own: the peers' own children can then be ended with it.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(writing,),
                start_new_session=True,
                cwd=Path(__file__).resolve().parent.parent,
            )
        finally:
            os.close(writing)
        self._buffer = b""
        self._nofile = given.get("nofile", resource.getrlimit(resource.RLIMIT_NOFILE)[0])

    @property
    def pid(self) -> int:
        """The trainer's process id."""
        return self._process.pid

    def fileno(self) -> int:
        """Return the descriptor that is readable when an answer comes, for ``select``."""
        return self._replies.fileno()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._end()

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises:
            EntrantFailedError: None came.
        """
        self.tell(command)
        return self.answer()

    def tell(self, command: str) -> None:
        """Send a command.

        Raises:
            EntrantFailedError: It takes none any more.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{command}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("its process ended") from None

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer; the first comes by itself, when the system is open.

        Raises:
            EntrantFailedError: None came.
        """
        deadline = time.monotonic() + _ANSWER_TIMEOUT
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._replies], [], [], left)[0]:
                raise self._failure(f"it did not answer within {_ANSWER_TIMEOUT:.0f} s")
            data = self._replies.read(65536)
            if not data:
                raise self._failure("its process ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let the system close and its process end."""
        with contextlib.suppress(EntrantFailedError):
            self.ask("close")
            self.join()

    def join(self) -> None:
        """Let the process end, which has closed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(60)

    def _failure(self, what: str) -> EntrantFailedError:
        """Say what happened with the last line that the process wrote, which is the exception's of a traceback."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._log.seek(0)
        text = self._log.read().decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        raised = [line for line in lines if "Error" in line.split(":")[0]]
        last = (raised or lines or [""])[-1][:_LAST_WORDS]
        if any(words in text for words in _OUT_OF_DESCRIPTORS):
            last += f" (it ran out of descriptors, of which RLIMIT_NOFILE gave it {self._nofile})"
        return EntrantFailedError(f"{what}: {last}" if last else what)

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._replies, self._log):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
