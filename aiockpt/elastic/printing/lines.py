"""Whole lines from the bytes of one stream, as a console that several streams share can show them.

Pure: bytes and the time in, blocks of lines out. A block is handled as one piece wherever it can be, by ``replace``,
``find`` and slices: with 20 bytes a line, work line by line costs ten times as much.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["LONGEST_LINE_NBYTES", "Lines", "matching", "needles", "prefixed", "printable", "settled"]

LONGEST_LINE_NBYTES = 64 << 10
"""A longer line is passed on in pieces of this, so that one without an end takes no memory; as much as a ring keeps."""
QUIET_SECONDS = 1.0
"""After that much silence an unfinished line is passed on: a prompt, or the last words of one that hangs."""
UPDATE_SECONDS = 1.0
"""A line that is overwritten by carriage returns is shown at most so often; what is newest is never older."""


class Lines:
    r"""Puts the lines of one stream together, however its bytes were cut.

    A carriage return goes back to the line's beginning: what comes then overwrites what was there, so that of all
    updates of a progress bar the newest counts, and ``\r\n`` ends a line like ``\n``.
    """

    __slots__ = ("_has_return", "_is_passed_on", "_over", "_rest", "due_at")

    def __init__(self) -> None:
        self._rest = b""
        """The unfinished line, behind its last carriage return."""
        self._over = b""
        """The newest of its updates that was not empty: shown until something overwrites it."""
        self._has_return = False
        self._is_passed_on = False
        """Its beginning was passed on, with a newline that it did not have."""
        self.due_at: float | None = None
        """When ``expire`` is to be called, on the clock of ``now``; None while no unfinished line waits."""

    def feed(self, data: bytes, now: float) -> bytes:
        """Take what was read and return the lines that are whole now, each with its newline."""
        if self._is_passed_on:
            self._is_passed_on = False
            if data[:1] == b"\n":
                data = data[1:]
        end = data.rfind(b"\n") + 1
        block, cut_off = b"", b""
        if end:
            block = self._finish(data[:end] if end < len(data) else data)
        if end < len(data):
            cut_off = self._begin(data[end:] if end else data)
        if not (self._rest or self._over):
            self.due_at = None
        elif self.due_at is None or end or not self._has_return:
            self.due_at = now + (UPDATE_SECONDS if self._has_return else QUIET_SECONDS)
        return block + cut_off if cut_off else block

    def expire(self) -> bytes:
        """Return what is to be shown of the unfinished line because its time has come.

        It ends with a newline, and what comes next is a line of its own; or, where the line is overwritten from time to
        time, with a carriage return: the line goes on.
        """
        self.due_at = None
        shown = self._rest or self._over
        if self._has_return:
            return shown + b"\r" if shown else b""
        self._rest, self._is_passed_on = b"", True
        return shown + b"\n"

    def end(self) -> bytes:
        """Return the unfinished line at the stream's end, with a newline; nothing where there is none."""
        shown = self._rest or self._over
        self._rest = self._over = b""
        self._has_return, self.due_at = False, None
        return shown + b"\n" if shown else b""

    def _finish(self, data: bytes) -> bytes:
        """Return the lines of ``data``, which ends with a newline, behind what waits."""
        if self._over:
            data = self._over + b"\r" + self._rest + data
        elif self._rest:
            data = self._rest + data
        self._rest = self._over = b""
        self._has_return = False
        return _cut(settled(data) if b"\r" in data else data)

    def _begin(self, data: bytes) -> bytes:
        """Take bytes without a newline and return the pieces that are too long to wait."""
        self._rest += data
        pieces = b""
        if b"\r" in data:
            self._has_return = True
            over, _, self._rest = self._rest.rpartition(b"\r")
            pieces, over = _settle(over)
            self._over = over or self._over
        if len(self._rest) > LONGEST_LINE_NBYTES:
            whole, newline, self._rest = _cut(self._rest).rpartition(b"\n")
            pieces += whole + newline
            self._over = b""
        return pieces


def settled(block: bytes) -> bytes:
    """Return lines as they look once all their carriage returns are done."""
    block = block.replace(b"\r\n", b"\n")
    if b"\r" not in block:
        return block
    lines = block.split(b"\n")
    for at, line in enumerate(lines):
        if b"\r" in line:
            lines[at] = b"".join(_settle(line))
    return b"\n".join(lines)


def _settle(line: bytes) -> tuple[bytes, bytes]:
    """Return the pieces, as lines, that were too long to be held back, and what is shown in the end."""
    line = line.rstrip(b"\r")
    if len(line) <= LONGEST_LINE_NBYTES:
        return b"", line.rpartition(b"\r")[2]
    pieces, shown = b"", b""
    for update in filter(None, line.split(b"\r")):
        whole, newline, shown = _cut(update).rpartition(b"\n")
        pieces += whole + newline
    return pieces, shown


def _cut(block: bytes) -> bytes:
    """Cut lines that are too long by newlines, between characters; in one jump over as many short lines as fit."""
    pieces = []
    begin = at = 0
    while len(block) - at > LONGEST_LINE_NBYTES:
        limit = at + LONGEST_LINE_NBYTES
        newline = block.rfind(b"\n", at, limit + 1)
        if newline >= 0:
            at = newline + 1
            continue
        at = _between_characters(block, limit)
        pieces.append(block[begin:at])
        begin = at
    if not pieces:
        return block
    pieces.append(block[begin:])
    return b"\n".join(pieces)


def _between_characters(data: bytes, at: int) -> int:
    """Return the last place up to ``at`` where no UTF-8 character is cut; ``at`` itself where this is not UTF-8."""
    for place in range(at, at - 4, -1):
        if data[place] & 0xC0 != 0x80:
            return place
    return at


def prefixed(block: bytes, prefix: bytes) -> bytes:
    """Put the prefix before each line of a block, which ends with a newline or a carriage return."""
    return prefix + block[:-1].replace(b"\n", b"\n" + prefix) + block[-1:]


def printable(block: bytes) -> bytes:
    """Return the block as UTF-8, with a replacement character for each byte that is none."""
    if block.isascii():
        return block
    try:
        block.decode()
    except UnicodeDecodeError:
        return block.decode(errors="replace").encode()
    return block


def needles(filters: Iterable[str]) -> tuple[bytes, ...]:
    """Return filters as ``matching`` wants them, without those that no line can contain."""
    encoded = (text.encode(errors="surrogateescape") for text in filters)
    return tuple(needle for needle in encoded if b"\n" not in needle[:-1])


def matching(block: bytes, needles: Sequence[bytes]) -> bytes:
    """Return the lines of a block of whole lines that contain any of the needles.

    A block without any costs a search and no more; then lines are looked at one by one, for the needles that are there.
    """
    present = [needle for needle in needles if needle in block]
    if not present:
        return b""
    lines = block.splitlines(keepends=True)  # which also splits at carriage returns: whole lines have none
    if len(present) == 1:  # a third of the time
        needle = present[0]
        return b"".join([line for line in lines if needle in line])
    return b"".join([line for line in lines if any(needle in line for needle in present)])
