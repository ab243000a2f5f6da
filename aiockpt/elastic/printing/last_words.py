"""The end of what a stream said, for the report of a failure."""

from __future__ import annotations

import os

from aiockpt.elastic.printing.lines import settled

__all__ = ["LAST_WORDS_NBYTES", "LastWords", "end_of_file"]

LAST_WORDS_NBYTES = 64 << 10
"""Kept per stream: a Python traceback has a few KiB, one of a distributed C++ stack a few dozen."""


class LastWords:
    """A ring of the last bytes of a stream."""

    __slots__ = ("_data", "_is_cut")

    def __init__(self) -> None:
        self._data = bytearray()
        self._is_cut = False

    def add(self, data: bytes) -> None:
        """Take more bytes; the oldest go."""
        if len(data) >= LAST_WORDS_NBYTES:
            self._is_cut = self._is_cut or bool(self._data) or len(data) > LAST_WORDS_NBYTES
            self._data[:] = memoryview(data)[-LAST_WORDS_NBYTES:]
            return
        self._data += data
        if len(self._data) > 2 * LAST_WORDS_NBYTES:  # seldom: each time costs a copy
            del self._data[:-LAST_WORDS_NBYTES]
            self._is_cut = True

    def text(self) -> str:
        """Return whole lines, where there are any, and each as it looked last."""
        is_cut = self._is_cut or len(self._data) > LAST_WORDS_NBYTES
        return _as_text(bytes(self._data[-LAST_WORDS_NBYTES:]), is_cut=is_cut)


def end_of_file(path: str) -> str:
    """Return the last lines of a file; blocks. Nothing where it cannot be read: there may be no more to say."""
    try:
        # Not blocking, for the path may be a terminal or a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError):
        return ""
    try:
        begin = max(0, os.fstat(descriptor).st_size - LAST_WORDS_NBYTES)
        return _as_text(os.pread(descriptor, LAST_WORDS_NBYTES, begin), is_cut=begin > 0)
    except OSError:
        return ""
    finally:
        os.close(descriptor)


def _as_text(data: bytes, *, is_cut: bool) -> str:
    if is_cut:
        data = data[
            data.find(b"\n", 0, -1) + 1 :
        ]  # the first line has no beginning; all of it where it is the only one
    return settled(data).decode(errors="replace")
