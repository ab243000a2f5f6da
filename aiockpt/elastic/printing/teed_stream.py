"""One stream of one child on its way from the pipe to file, console and filters."""

from __future__ import annotations

from collections.abc import Sequence

from aiockpt.elastic.printing.last_words import LastWords
from aiockpt.elastic.printing.lines import Lines, matching, prefixed, printable
from aiockpt.elastic.printing.log_writer import LogFeed
from aiockpt.elastic.printing.output_statistics import StreamStatistics

__all__ = ["TeedStream"]


class TeedStream:
    """Divides what was read; reads and writes nothing itself.

    Args:
        rank: The child's.
        name: "stdout" or "stderr".
        descriptor: The pipe's end that is read; -1 once it is closed.
        prefix: Stands before each line, but in the stream's own file.
        file: The stream's own file, if it has one: gets all bytes as they are.
        console: Gets all lines.
        filtered: Gets the lines that contain one of ``needles``, if there are filters.
        needles: As ``lines.needles`` makes them.
    """

    def __init__(
        self,
        rank: int,
        name: str,
        descriptor: int,
        *,
        prefix: bytes,
        file: LogFeed | None,
        console: LogFeed,
        filtered: LogFeed | None,
        needles: Sequence[bytes],
    ) -> None:
        self.rank = rank
        self.name = name
        self.descriptor = descriptor
        self.unread_nbytes = 0
        self.last_words = LastWords()
        self._prefix = prefix
        self._file = file
        self._console = console
        self._filtered = filtered
        self._needles = needles
        self._lines = Lines()
        self._lines_read = 0
        self._nbytes_read = 0

    @property
    def due_at(self) -> float | None:
        """When ``expire`` is to be called; None while no unfinished line waits."""
        return self._lines.due_at

    @property
    def is_behind(self) -> bool:
        """Whether much that was taken is not written yet."""
        return any(feed is not None and feed.is_behind for feed in (self._file, self._console, self._filtered))

    def take(self, data: bytes, now: float) -> None:
        """Pass on what was read at ``now``."""
        self._lines_read += data.count(b"\n")
        self._nbytes_read += len(data)
        self.last_words.add(data)
        if self._file is not None:
            self._file.put(data)
        self._show(self._lines.feed(data, now))

    def expire(self) -> None:
        """Pass on an unfinished line."""
        self._show(self._lines.expire())

    def end(self) -> None:
        """Pass on what is left, and tell of what was dropped."""
        self._show(self._lines.end())
        for feed in (self._file, self._console, self._filtered):  # the file first: its marks go to the console too
            if feed is not None:
                feed.end()

    def statistics(self) -> StreamStatistics:
        """Return the numbers as they are now."""
        file, filtered = self._file, self._filtered
        return StreamStatistics(
            rank=self.rank,
            stream=self.name,
            lines_read=self._lines_read,
            nbytes_read=self._nbytes_read,
            unread_nbytes=self.unread_nbytes,
            file_lines_dropped=file.dropped_lines if file is not None else 0,
            file_nbytes_dropped=file.dropped_nbytes if file is not None else 0,
            console_lines_dropped=self._console.dropped_lines,
            console_nbytes_dropped=self._console.dropped_nbytes,
            filtered_lines_dropped=filtered.dropped_lines if filtered is not None else 0,
            filtered_nbytes_dropped=filtered.dropped_nbytes if filtered is not None else 0,
        )

    def _show(self, block: bytes) -> None:
        if not block:
            return
        self._console.put(prefixed(printable(block), self._prefix))
        if self._filtered is None or block.endswith(b"\r"):  # an update: the line itself comes later
            return
        found = matching(block, self._needles)
        if found:
            self._filtered.put(prefixed(found, self._prefix))
