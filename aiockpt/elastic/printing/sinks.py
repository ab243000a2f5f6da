"""What log writers write to: files, and the console."""

from __future__ import annotations

import contextlib
import io
import os
import select
from collections.abc import Sequence
from typing import Any, TextIO

from aiockpt.errors import ConfigError, StorageError

__all__ = ["Console", "Cursor", "LogFile", "open_log"]

_CONSOLE_WAIT_SECONDS = 1.0
"""For one look whether a console that does not block takes bytes again; then the next."""


def open_log(path: str) -> int:
    """Open a log file for appending and return its descriptor, which no child inherits by itself.

    Nothing in it is lost: what several write, each by a descriptor of its own, comes one behind the other.

    Raises:
        ConfigError: The path is none.
        StorageError: The operating system refused.
    """
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY, 0o666)
    except OSError as exc:
        raise StorageError(
            f"the log file {path} was not opened",
            why=f"{exc.strerror} (errno {exc.errno})",
            next="give a log_dir that can be written to, or redirect and tee nothing",
            errno=exc.errno,
            path=path,
        ) from exc
    except ValueError as exc:
        raise ConfigError(
            f"{path!r} cannot be a log file",
            why=str(exc),
            next="give another log_dir",
            argument="logs_specs",
            path=path,
        ) from exc


class LogFile:
    """A file that was opened for appending, and gets bytes as they are."""

    is_tried_again = True

    def __init__(self, path: str, descriptor: int) -> None:
        self.name = path
        self._descriptor = descriptor
        self._trouble = ""

    def write(self, blocks: Sequence[bytes], source: object) -> int:
        """Append; may write less than all."""
        try:
            nbytes = os.writev(self._descriptor, blocks)
        except OSError as exc:
            self._trouble = exc.strerror or str(exc)
            raise
        self._trouble = ""
        return nbytes

    def excuse(self) -> str:
        """Return the last error, or that it takes too long."""
        return self._trouble or "the log disk is too slow"

    def close(self) -> None:
        """Close the descriptor."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # what close() reports, nobody can act upon
                os.close(descriptor)


class Cursor:
    """Where the next text appears on the terminal that stdout and stderr share as a rule.

    A line that ended with a carriage return is overwritten by what comes next, which only its own stream may do.
    """

    def __init__(self) -> None:
        self.holder: object = None
        """The stream whose unfinished line the cursor stands on."""
        self.console: Console | None = None


class Console:
    """``sys.stdout`` or ``sys.stderr``, or what a notebook or a test put in its place.

    Args:
        name: "stdout" or "stderr".
        stream: What is written to: its ``buffer`` where it has one, else itself, as text. None is no console at all.
        cursor: Shared by both.
    """

    is_tried_again = False

    def __init__(self, name: str, stream: TextIO | None, cursor: Cursor) -> None:
        self.name = f"the console ({name})"
        self._stream: Any = stream
        self._buffer: Any = getattr(stream, "buffer", None)
        self._cursor = cursor

    def write(self, blocks: Sequence[bytes], source: object) -> int:
        """Write and flush all of it.

        Raises:
            OSError: It takes nothing more, now or ever, for whatever reason.
        """
        data = b"".join(blocks)
        try:
            self._leave_line(source)
            self._show(data)
        except OSError:
            raise
        except Exception as exc:
            raise OSError(f"{type(exc).__name__}: {exc}") from exc  # closed, or not a file that we know
        if data.endswith(b"\r"):
            self._cursor.holder, self._cursor.console = source, self
        return len(data)

    def excuse(self) -> str:
        """Return that it is too slow."""
        return "the console is too slow"

    def close(self) -> None:
        """Leave it open: it is the program's."""

    def _leave_line(self, source: object) -> None:
        holder, console = self._cursor.holder, self._cursor.console
        self._cursor.holder = self._cursor.console = None
        if console is not None and holder is not source:
            with contextlib.suppress(Exception):  # the other one's trouble is not this one's
                console._show(b"\n")

    def _show(self, data: bytes) -> None:
        if self._stream is None:
            return
        if self._buffer is None:
            self._stream.write(data.decode(errors="replace"))
            self._stream.flush()
        elif isinstance(self._buffer, io.BufferedWriter | io.FileIO):
            # By its descriptor: a thread that is stuck in the buffer's own write holds its lock, and at the
            # interpreter's exit that is a fatal error. Asked for each time, so that a closed one is an error.
            _write_all(self._buffer.fileno(), data)
        else:
            self._buffer.write(data)
            self._buffer.flush()


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:  # somebody made it non-blocking: it is a slow one, no broken one
            ready = select.poll()
            ready.register(descriptor, select.POLLOUT)
            ready.poll(_CONSOLE_WAIT_SECONDS * 1000)
