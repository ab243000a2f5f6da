"""The bounded buffer between one stream and one place that it is written to.

One thread puts, another takes. There is no lock: what both look at is a deque, and counters that one of them changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["MOST_WAITING_NBYTES", "Feed"]

MOST_WAITING_NBYTES = 16 << 20
"""What may wait for a disk or a console that is too slow; more is dropped by whole lines."""
_RESUME_NBYTES = MOST_WAITING_NBYTES // 2
"""A gap ends when no more than this waits, so that a slow place has few long gaps and not many short ones."""
_BLOCK_NBYTES = 64
"""What a block takes beside its bytes: a child that prints byte by byte must not fill the memory with objects."""
_BLOCKS_AT_ONCE = 256
"""Taken in one turn; the kernel's limit for one writev is 1024."""

Sink = TypeVar("Sink")


class Feed(Generic[Sink]):
    """Passes the bytes of one stream on in order; where too many wait it drops whole lines, and marks the gap.

    Args:
        sink: Where they go.
        wake: Has the other thread take what waits. Called by ``put``, in its thread, when nothing was waiting before.
        excuse: Says at the beginning of a gap why nothing more fits.
        prefix: Stands before the mark, as it does before the lines.
        on_gap: Told once, at the first gap's beginning, the reason.
        on_mark: Told the mark's text at the end of each gap.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        wake: Callable[[Feed[Sink]], None],
        excuse: Callable[[], str],
        prefix: bytes = b"",
        on_gap: Callable[[str], None] = lambda why: None,
        on_mark: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.sink = sink
        self.is_awake = False
        """The other thread knows that something waits."""
        self.taken: list[bytes] = []
        """What was taken and is not written yet; the other thread's own."""
        self._wake = wake
        self._excuse = excuse
        self._prefix = prefix
        self._on_gap = on_gap
        self._on_mark = on_mark
        self._blocks: deque[bytes] = deque()
        self._put_nbytes = self._put_blocks = 0  # changed by the thread that puts
        self._done_nbytes = self._done_blocks = 0  # changed by the thread that takes
        self._is_given_up = False
        self._is_at_line_start = True
        self._gap_why: str | None = None
        self._gap_lines = 0
        self._is_amid_dropped_line = False
        self._refused_lines = self._refused_nbytes = 0  # by the thread that puts
        self._lost_lines = self._lost_nbytes = 0  # by the thread that takes, or when it is gone

    @property
    def waiting_nbytes(self) -> int:
        """Bytes that were accepted and are not written."""
        return self._put_nbytes - self._done_nbytes

    @property
    def dropped_lines(self) -> int:
        """Lines that will never be written, one that has no end among them."""
        return self._refused_lines + self._lost_lines + self._is_amid_dropped_line

    @property
    def dropped_nbytes(self) -> int:
        """Bytes that will never be written."""
        return self._refused_nbytes + self._lost_nbytes

    @property
    def is_behind(self) -> bool:
        """Whether so much waits that the thread that puts had better wait a little; once lines are dropped, no more."""
        return self._gap_why is None and self._memory_nbytes() > _RESUME_NBYTES

    # The thread that puts

    def put(self, data: bytes) -> None:
        """Accept bytes, or drop them."""
        if self._is_given_up:
            self._drop(data)
        elif self._gap_why is not None:
            if self._memory_nbytes() > _RESUME_NBYTES:
                self._drop(data)
            else:
                self._resume(data)
        elif not self.waiting_nbytes or self._memory_nbytes() + len(data) <= MOST_WAITING_NBYTES:
            self._accept(data)
        else:
            self._begin_gap(data)

    def end(self) -> None:
        """Mark a gap that lasts until the end."""
        if self._gap_why is not None and not self._is_given_up:
            self._resume(b"")

    def _memory_nbytes(self) -> int:
        return self.waiting_nbytes + _BLOCK_NBYTES * (self._put_blocks - self._done_blocks)

    def _accept(self, data: bytes) -> None:
        if not data:
            return
        self._put_nbytes += len(data)
        self._put_blocks += 1
        self._is_at_line_start = _ends_line(data)
        self._blocks.append(data)
        if not self.is_awake:
            self.is_awake = True
            self._wake(self)

    def _drop(self, data: bytes) -> None:
        if not data:
            return
        lines = data.count(b"\n")
        self._refused_lines += lines
        self._refused_nbytes += len(data)
        self._gap_lines += lines
        self._is_amid_dropped_line = not _ends_line(data)

    def _begin_gap(self, data: bytes) -> None:
        if not self._is_at_line_start:  # whole lines: the one that was begun is the last
            end = data.find(b"\n") + 1
            self._accept(data[:end])
            data = data[end:]
        if not self._refused_nbytes:
            self._on_gap(self._excuse())
        self._gap_why, self._gap_lines = self._excuse(), 0
        self._drop(data)

    def _resume(self, data: bytes) -> None:
        if self._is_amid_dropped_line:
            if data:
                end = data.find(b"\n") + 1
                self._drop(data[:end] if end else data)
                if not end:
                    return
                data = data[end:]
            else:
                self._refused_lines += 1
                self._gap_lines += 1
                self._is_amid_dropped_line = False
        text = f"{self._gap_lines} line{'s' * (self._gap_lines != 1)} dropped: {self._gap_why}"
        self._gap_why = None
        newline = b"" if self._is_at_line_start else b"\n"
        self._accept(newline + self._prefix + f"[aiockpt: {text}]\n".encode())
        self._accept(data)
        self._on_mark(text)

    # The thread that takes

    def take(self) -> bool:
        """Move some of what waits to ``taken`` and return whether anything is there."""
        self.is_awake = False  # before looking: what is put from here on wakes again
        while self._blocks and len(self.taken) < _BLOCKS_AT_ONCE:
            self.taken.append(self._blocks.popleft())
        return bool(self.taken)

    def wrote(self, nbytes: int) -> None:
        """Forget the first ``nbytes`` of ``taken``; they are written."""
        self._done_nbytes += nbytes
        whole = 0
        while whole < len(self.taken) and nbytes >= len(self.taken[whole]):
            nbytes -= len(self.taken[whole])
            whole += 1
        del self.taken[:whole]
        self._done_blocks += whole
        if nbytes:
            self.taken[0] = self.taken[0][nbytes:]

    def give_up(self) -> None:
        """Count what waits as dropped, and drop all that comes."""
        self._is_given_up = True
        while self.take():
            nbytes = sum(map(len, self.taken))
            self._lost_lines += sum(block.count(b"\n") for block in self.taken)
            self._lost_nbytes += nbytes
            self.wrote(nbytes)

    def abandon(self) -> int:
        """Count what waits as dropped once nobody takes any more, and return how many bytes that were.

        The thread that took may be stuck in the write of a part of it: then that part is told as lost, and may not be.
        """
        if self._is_given_up:
            return 0
        self._is_given_up = True
        waiting = (*self._blocks, *self.taken)
        nbytes = self.waiting_nbytes
        self._blocks.clear()
        self._lost_lines += sum(block.count(b"\n") for block in waiting)
        self._lost_nbytes += nbytes
        return nbytes


def _ends_line(data: bytes) -> bool:
    return data[-1] in b"\r\n"
