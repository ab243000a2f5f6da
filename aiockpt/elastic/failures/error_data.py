"""What an error file says, whoever wrote it: torch, this package, or nobody who can be named.

Standard library alone, as the children that copy such files need it.
"""

from __future__ import annotations

import json
import os
import stat
from typing import Any, NamedTuple

__all__ = ["LARGEST_NBYTES", "NOT_AVAILABLE", "SECTION", "ErrorData", "read_error_file"]

NOT_AVAILABLE = "<N/A>"
"""Torch's word where there is no file, no signal, no message."""
SECTION = "aiockpt"
"""Key beside torch's ``message`` under which our files say more."""
LARGEST_NBYTES = 1 << 20
"""A file above this is not parsed: its writer may be anything. Ours stay below, see ``error_file``."""

_RAW_NBYTES = 4 << 10
_LAST_SECOND = 253_370_764_800
"""9999-01-01: what ``datetime`` can show in every time zone ends here."""


class ErrorData(NamedTuple):
    """An error file that was found.

    Args:
        data: Its JSON; ``{"message": "<NONE>"}`` where it could not be read.
        message: As torch gives it: a text, or a dict with the traceback at ``["extraInfo"]["py_callstack"]``.
        timestamp: Seconds since the epoch, if it has them.
        monotonic_ns: When the error was recorded on ``CLOCK_MONOTONIC``, if it says so (ours do).
        problem: What is wrong with the file; empty where it was understood.
        raw: Where it was not: how it begins.
    """

    data: dict[str, Any]
    message: str | dict[str, Any]
    timestamp: int | None
    monotonic_ns: int | None
    problem: str
    raw: str


def read_error_file(path: str) -> ErrorData | None:
    """Read what a child left as its error file; never raises for what it finds, and reads at most 1 MiB.

    Returns:
        None where there is no regular file.
    """
    try:
        raw = _read(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the path
        return None
    except OSError as exc:
        return _not_understood(f"it cannot be read: {exc.strerror} (errno {exc.errno})", b"")
    if raw is None:
        return None
    if not raw:
        return _not_understood("it is empty", raw)
    if len(raw) > LARGEST_NBYTES:
        return _not_understood(f"it is longer than {LARGEST_NBYTES} bytes", raw)
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as exc:  # a half-written file, bad UTF-8, digits or brackets by the thousand
        return _not_understood(f"it is not JSON, or not all of it: {exc}", raw)
    return _understand(data, raw)


def _read(path: str) -> bytes | None:
    # O_NONBLOCK: a FIFO of that name must not hold the supervisor.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        read = bytearray()
        while len(read) <= LARGEST_NBYTES:
            piece = os.read(fd, LARGEST_NBYTES + 1 - len(read))
            if not piece:
                break
            read += piece
        return bytes(read)
    finally:
        os.close(fd)


def _understand(data: Any, raw: bytes) -> ErrorData:
    message = data.get("message") if isinstance(data, dict) else None
    if isinstance(message, str):
        timestamp = data.get("timestamp")
    elif isinstance(message, dict):
        extra = message.get("extraInfo")
        timestamp = extra.get("timestamp") if isinstance(extra, dict) else None
    else:
        return _not_understood("it is JSON without a message in torch's format", raw)
    section = data.get(SECTION)
    monotonic = section.get("monotonic_ns") if isinstance(section, dict) else None
    return ErrorData(data, message, _seconds(timestamp), monotonic if type(monotonic) is int else None, "", "")


def _seconds(value: Any) -> int | None:
    """Return a timestamp, which torch writes as a text and others as a number, where it is one of this world."""
    try:
        seconds = int(value)
    except (TypeError, ValueError, OverflowError):  # OverflowError: JSON's 1e999
        return None
    return seconds if 0 < seconds < _LAST_SECOND else None


def _not_understood(problem: str, raw: bytes) -> ErrorData:
    # The data is made anew each time: whoever adds to it must not add to that of others.
    beginning = raw[:_RAW_NBYTES].decode("utf-8", "backslashreplace")
    return ErrorData({"message": "<NONE>"}, "", None, None, problem, beginning)
