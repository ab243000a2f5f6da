"""What became of the output of the children, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["OutputStatistics", "StreamStatistics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamStatistics:
    """One stream that is teed; others are not read by the supervisor."""

    rank: int
    stream: str
    """"stdout" or "stderr"."""
    lines_read: int
    """Newlines that were read."""
    nbytes_read: int
    unread_nbytes: int
    """Left in the pipe, because the time to finish was over."""
    file_lines_dropped: int
    """Lines that are missing in the stream's own file."""
    file_nbytes_dropped: int
    console_lines_dropped: int
    console_nbytes_dropped: int
    filtered_lines_dropped: int
    """Lines that are missing in the file of all ranks that the filters fill."""
    filtered_nbytes_dropped: int

    @property
    def lines_dropped(self) -> int:
        """Lines that are missing, each place counted by itself."""
        return self.file_lines_dropped + self.console_lines_dropped + self.filtered_lines_dropped


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputStatistics:
    """All streams that are teed, and the errors of what they are written to."""

    streams: tuple[StreamStatistics, ...]
    errors: Mapping[str, int]
    """Reads and writes that failed, by the path of the file, ``"the console (stdout)"``, or ``"rank 0 stdout"``."""

    @property
    def lines_read(self) -> int:
        """Lines of all streams."""
        return sum(stream.lines_read for stream in self.streams)

    @property
    def nbytes_read(self) -> int:
        """Bytes of all streams."""
        return sum(stream.nbytes_read for stream in self.streams)

    @property
    def lines_dropped(self) -> int:
        """Lines of all streams that are missing somewhere, each place counted by itself."""
        return sum(stream.lines_dropped for stream in self.streams)
