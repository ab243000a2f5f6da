"""The thread that writes what streams printed, so that no disk and no console holds up the event loop or a child."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Protocol, TypeAlias

from aiockpt.elastic.printing.feed import Feed

__all__ = ["LogFeed", "LogSink", "LogWriter"]

RETRY_SECONDS = 1.0
"""A file that could not be written is tried again so long after, while something waits for it."""
_CLOSE_SECONDS = 1.0
"""``close`` waits so long for a thread that has nothing to do but end."""


class LogSink(Protocol):
    """Where a writer writes. Its methods are called in the writer's thread alone."""

    name: str
    """For messages: a path, or which console."""
    is_tried_again: bool
    """Whether a write may succeed after one that failed."""

    def write(self, blocks: Sequence[bytes], source: object) -> int:
        """Write as much as can be and return how many bytes were.

        Args:
            blocks: At least one, in order.
            source: Who printed them; the same object for the same stream.

        Raises:
            OSError: Nothing was written.
        """

    def excuse(self) -> str:
        """Return why it may be that nothing is taken; may be called in any thread."""

    def close(self) -> None:
        """Give up what it holds."""


LogFeed: TypeAlias = Feed[LogSink]


class LogWriter:
    """One thread, and what it writes to.

    It begins with ``start`` and sleeps, with no time-out, while nothing waits. A sink that fails is named in the log
    once; what waits for it stays, and is tried again every ``RETRY_SECONDS``.

    Args:
        name: The thread's name.
        report: Logs a warning, ``%``-style; called in the writer's thread, must not block it for long.
    """

    def __init__(self, name: str, *, report: Callable[..., None]) -> None:
        self._report = report
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)  # stuck, it must not hold the exit
        self._items: SimpleQueue[LogFeed | Callable[[], object] | None] = SimpleQueue()
        self._sinks: list[LogSink] = []
        self._feeds: list[LogFeed] = []
        self._failing: set[int] = set()
        """The ids of the sinks whose last write failed."""
        self._held: dict[LogFeed, None] = {}
        """Feeds that wait for those, in the order in which they are to be written."""
        self._retry_at = 0.0
        self._is_abandoned = False
        self.errors: Counter[str] = Counter()
        """Writes that failed, by the sink's name."""

    def add(self, sink: LogSink) -> None:
        """Make the sink the writer's own, which closes it; before ``start``."""
        self._sinks.append(sink)

    def feed(
        self,
        sink: LogSink,
        *,
        prefix: bytes = b"",
        on_gap: Callable[[str], None] = lambda why: None,
        on_mark: Callable[[str], None] = lambda text: None,
    ) -> LogFeed:
        """Return a new way to a sink of this writer."""
        feed: LogFeed = Feed(
            sink, wake=self._items.put, excuse=sink.excuse, prefix=prefix, on_gap=on_gap, on_mark=on_mark
        )
        self._feeds.append(feed)
        return feed

    def start(self) -> None:
        """Start the thread, where there is something to write to.

        Raises:
            RuntimeError: There can be no more threads.
        """
        if self._sinks:
            self._thread.start()

    def call(self, function: Callable[[], object]) -> None:
        """Have a function called in the thread, behind what was put before; from any thread, does not block."""
        self._items.put(function)

    def end(self, timeout: float) -> dict[str, int]:
        """Wait until all that was put is written, or was tried a last time; then the thread ends.

        Blocks up to ``timeout`` seconds. What is not written then never will be, and counts as dropped.

        Returns:
            The bytes that were not written, by the sink's name, where there are any.
        """
        self._items.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout)
        self._is_abandoned = True
        unwritten: Counter[str] = Counter()
        for feed in self._feeds:
            unwritten[feed.sink.name] += feed.abandon()
        return dict(+unwritten)

    def close(self) -> None:
        """End the thread without writing more, and close the sinks; idempotent.

        A thread that is stuck in a write is left behind, and closes them when it comes out of it.
        """
        is_first, self._is_abandoned = not self._is_abandoned, True
        if self._thread.is_alive():
            self._items.put(None)
            if is_first:
                self._thread.join(_CLOSE_SECONDS)
        elif self._thread.ident is None:
            self._close_sinks()

    # In the thread

    def _run(self) -> None:
        try:
            while not self._is_abandoned:
                try:
                    item = self._items.get(timeout=self._seconds_to_retry())
                except Empty:
                    item = self._retry
                if item is None:
                    break
                if isinstance(item, Feed):
                    self._serve(item)
                else:
                    item()
                if self._held and time.monotonic() >= self._retry_at:
                    self._retry()
            self._failing.clear()
            for feed in {**self._held, **dict.fromkeys(self._feeds)}:
                while self._serve(feed):
                    pass
        finally:
            self._close_sinks()

    def _seconds_to_retry(self) -> float | None:
        return max(0.0, self._retry_at - time.monotonic()) if self._held else None

    def _retry(self) -> None:
        held, self._held = self._held, {}
        self._failing.clear()
        for feed in held:
            self._serve(feed)

    def _serve(self, feed: LogFeed) -> bool:
        """Write some of what waits in a feed and return whether there is more."""
        if id(feed.sink) in self._failing:
            self._held[feed] = None
            return False
        feed.take()
        while feed.taken and not self._is_abandoned:
            try:
                nbytes = feed.sink.write(feed.taken, feed)
            except OSError as exc:
                if not self._is_abandoned:
                    self._failed(feed, exc)
                return False
            feed.wrote(nbytes)
        if self._is_abandoned or not feed.waiting_nbytes:
            return False
        if not feed.is_awake:
            feed.is_awake = True
            self._items.put(feed)  # behind the others
        return True

    def _failed(self, feed: LogFeed, error: OSError) -> None:
        sink = feed.sink
        self.errors[sink.name] += 1
        if not sink.is_tried_again:
            feed.give_up()
        else:
            self._failing.add(id(sink))
            self._held[feed] = None
            self._retry_at = time.monotonic() + RETRY_SECONDS
            feed.is_awake = True  # what is put meanwhile need not wake anybody
        if self.errors[sink.name] == 1:
            self._report("nothing more is written to %s for now\nwhy: %s\nnext: %s", sink.name, error, _advice(sink))

    def _close_sinks(self) -> None:
        for sink in self._sinks:
            sink.close()


def _advice(sink: LogSink) -> str:
    if sink.is_tried_again:
        return "make room, or mend it; it is tried again, and what no longer fits into memory is dropped and counted"
    return "look at the log files; the console gets nothing more, and the children go on"
