"""CPU lists as the kernel writes them: ``0-2,4,6-7``."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["format_ranges", "parse_ranges"]

_MOST = 1 << 20
"""More CPUs than a kernel can be built for (8,192), so that a broken file does not fill the memory."""


def parse_ranges(text: str) -> frozenset[int]:
    """Return the numbers of a list of ranges; blanks and the newline of a file do not count.

    Raises:
        ValueError: It is no such list; the message says which part.
    """
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first and not dash:
            continue
        if not (_is_number(first) and (_is_number(last) or not dash)):
            raise ValueError(f"{part.strip()!r} is neither a number nor a range of two")
        start, stop = int(first), int(last or first) + 1
        if not start < stop <= _MOST:
            raise ValueError(f"the range {part.strip()!r} runs backwards, or beyond {_MOST}")
        found.update(range(start, stop))
    return frozenset(found)


def format_ranges(numbers: Iterable[int]) -> str:
    """Return numbers as a list of ranges, the shortest; ``""`` for none."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9
