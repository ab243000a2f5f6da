"""Reading the pipes of the teed streams on the event loop."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import termios
from collections import Counter
from collections.abc import Callable

import anyio
import anyio.lowlevel

from aiockpt.elastic.printing.teed_stream import TeedStream

__all__ = ["PipeReader"]

_READ_NBYTES = 256 << 10
"""Read at once, and divided in one go: that may take the event loop a millisecond or two."""
_PAUSE_SECONDS = 0.01
"""Between two reads of a stream that is behind, until lines are dropped: memory is read faster than a disk writes, and
the threads that write need their turn. It holds up a child for a third of a second before each gap, and no more; what
writes 25 MB/s in the long run loses nothing in it."""


class PipeReader:
    """Reads all streams until each is at its end, or until it is stopped; then what is left without waiting.

    While nothing is printed nothing wakes up: there is a timer only while an unfinished line waits.

    Args:
        report: Logs a warning, ``%``-style; must not block.
    """

    def __init__(self, *, report: Callable[..., None]) -> None:
        self._streams: list[TeedStream] = []
        self._report = report
        self._buffer = memoryview(b"")
        self._scope: anyio.CancelScope | None = None
        self._is_over: anyio.Event | None = None
        self._is_stopped = False
        self.errors: Counter[str] = Counter()
        """Reads that failed, by ``"rank 0 stdout"``."""

    def add(self, stream: TeedStream) -> None:
        """Make the descriptor of a stream, which must not block, the reader's own; before ``run``."""
        self._streams.append(stream)
        self._buffer = self._buffer or memoryview(bytearray(_READ_NBYTES))

    async def run(self) -> None:
        """Read until all streams are at their end, or ``stop`` is called.

        Cancellation: nothing that was read is lost; ``drain`` reads the rest.
        """
        is_over = self._is_over = anyio.Event()
        try:
            with anyio.CancelScope() as self._scope:
                if self._is_stopped:
                    return
                async with anyio.create_task_group() as group:
                    for stream in self._streams:
                        group.start_soon(self._read, stream)
        finally:
            is_over.set()

    async def stop(self) -> None:
        """Have ``run`` end, and wait for it; does not yield where it is not running."""
        self._is_stopped = True
        if self._scope is not None:
            self._scope.cancel()
        if self._is_over is not None:
            await self._is_over.wait()

    async def drain(self, deadline: float) -> None:
        """Read what the pipes hold now, once ``run`` is over: a descendant that lives on may add to it for ever.

        Args:
            deadline: On the event loop's clock; what is left then is counted and lost.
        """
        for stream in self._streams:
            left = _pipe_nbytes(stream.descriptor)
            while left > 0:
                if anyio.current_time() > deadline:
                    stream.unread_nbytes = left
                    break
                nbytes = self._pull(stream)
                if nbytes <= 0:
                    break
                left -= nbytes
                await anyio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close the pipes; idempotent. ``run`` must be over."""
        for stream in self._streams:
            _close(stream)

    async def _read(self, stream: TeedStream) -> None:
        nbytes = -1
        while nbytes:
            due_at = stream.due_at
            if stream.is_behind:
                await anyio.sleep(_PAUSE_SECONDS)
            if nbytes == _READ_NBYTES and (due_at is None or due_at > anyio.current_time()):
                await anyio.lowlevel.checkpoint()  # there is more, as it seems
            elif due_at is None:
                await anyio.wait_readable(stream.descriptor)
            else:
                with anyio.CancelScope(deadline=due_at) as scope:
                    await anyio.wait_readable(stream.descriptor)
                if scope.cancelled_caught:
                    stream.expire()
            nbytes = self._pull(stream)

    def _pull(self, stream: TeedStream) -> int:
        """Read once and return the number of bytes: 0 at the stream's end, -1 where there is nothing yet."""
        try:
            nbytes = os.readv(stream.descriptor, [self._buffer])
        except BlockingIOError:
            return -1
        except OSError as exc:
            what = f"rank {stream.rank} {stream.name}"
            self.errors[what] += 1
            self._report("%s is not read any more\nwhy: %s\nnext: look at its log file; the others go on", what, exc)
            nbytes = 0
        if nbytes:
            stream.take(bytes(self._buffer[:nbytes]), anyio.current_time())
        else:
            stream.end()
            _close(stream)
        return nbytes


def _close(stream: TeedStream) -> None:
    descriptor, stream.descriptor = stream.descriptor, -1
    if descriptor >= 0:
        os.close(descriptor)


def _pipe_nbytes(descriptor: int) -> int:
    """Return how many bytes a pipe holds."""
    if descriptor < 0:
        return 0
    held = array.array("i", [0])
    with contextlib.suppress(OSError):
        fcntl.ioctl(descriptor, termios.FIONREAD, held)
    return held[0]
