"""Standard error of the worker: a pipe to the trainer's log, to which no write raises or waits."""

from __future__ import annotations

import io
import logging
import os
import sys

__all__ = ["GuardedStderr", "install"]


class GuardedStderr(io.TextIOBase):
    """Writes what the pipe takes now, and drops the rest: a trainer that is gone or reads nothing stops no save."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.dropped = 0
        """Bytes that nobody will read."""

    @property
    def encoding(self) -> str:  # type: ignore[override]  # the base class has a settable attribute here
        """What ``write`` makes of text."""
        return "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]  # as above
        """How ``write`` treats what UTF-8 does not have."""
        return "backslashreplace"

    def fileno(self) -> int:
        """Return the descriptor, for faulthandler."""
        return self._fd

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Write at once; never raises."""
        data = text.encode("utf-8", "backslashreplace")
        try:
            written = os.write(self._fd, data)
        except OSError:
            written = 0
        self.dropped += len(data) - written
        return len(text)


def install() -> GuardedStderr:
    """Put the guard in the place of ``sys.stderr``, and send the log there."""
    guard = GuardedStderr(2)
    sys.stderr = guard
    sys.__stderr__ = guard  # type: ignore[misc,assignment]  # Final for type checkers, but the last tracebacks go there
    handler = logging.StreamHandler(guard)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.raiseExceptions = False
    return guard
