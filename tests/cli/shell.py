"""The command line as a process, on pipes or on a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import pyte

SECONDS = 60.0
_PROGRAM = "import sys\n{code}\nfrom aiockpt.cli.main import main\nsys.exit(main(sys.argv[1:]))"
_ON_A_TERMINAL = """
import fcntl, signal, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C becomes a signal
signal.signal(signal.SIGINT, signal.default_int_handler)
"""
_HOW_TO_DRAW = ("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "COLUMNS", "LINES")


def command(
    *arguments: str | Path, code: str = "", seconds: float = SECONDS, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``aiockpt`` with these arguments, after ``code``, with ``path`` in front of what can be imported."""
    environment = _environment()
    if path is not None:
        environment["PYTHONPATH"] = f"{path}:{os.getcwd()}"
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(code=code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=environment,
    )


def _environment() -> dict[str, str]:
    """Return ours without what says how to draw: the workers of a parallel test run have COLUMNS."""
    return {name: value for name, value in os.environ.items() if name not in _HOW_TO_DRAW}


class Terminal:
    """``aiockpt`` on a terminal of its own, and what somebody in front of it sees; a context manager.

    Args:
        *arguments: Of the command.
        columns: Of the terminal.
        rows: Of the terminal; enough that nothing scrolls away.
        code: Runs first.
        **environment: Variables to be set.
    """

    def __init__(
        self, *arguments: str | Path, columns: int = 80, rows: int = 200, code: str = "", **environment: str
    ) -> None:
        self.written = b""
        """All that the command wrote, with its control codes."""
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (rows, columns))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM.format(code=_ON_A_TERMINAL + code), *map(str, arguments)],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                env={**_environment(), "TERM": "xterm-256color", **environment},
                start_new_session=True,
            )
        finally:
            os.close(theirs)

    @property
    def lines(self) -> list[str]:
        """What stands on the screen, without the empty lines at its end."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip().splitlines()

    @property
    def text(self) -> str:
        """What stands on the screen."""
        return "\n".join(self.lines)

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Watch the screen until the condition holds; fail after a while, or where the command ends before."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self._read(deadline), f"the command ended before {what}:\n{self.text}"

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._ours, keys)

    def finish(self, seconds: float = SECONDS) -> int:
        """Watch until the command ends; returns its exit status."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        return self._process.wait(max(1.0, deadline - time.monotonic()))

    def _read(self, deadline: float) -> bool:
        """Take in what is written next; False where the other side is closed."""
        assert select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))[0], f"it hung:\n{self.text}"
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # EIO: the other side is closed by all
            return False
        self.written += data
        self._stream.feed(data)
        return bool(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)


def on_a_terminal(*arguments: str | Path, seconds: float = SECONDS) -> tuple[int, str]:
    """Run ``aiockpt`` on a terminal of 100 columns; return its status and all that it wrote there."""
    with Terminal(*arguments, columns=100) as terminal:
        return terminal.finish(seconds), terminal.written.decode()
