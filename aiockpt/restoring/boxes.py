"""Boxes of a tensor, as they lie in files and in memory → the bytes that go from one to the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

__all__ = ["Box", "Transfer", "cut", "transfer", "whole"]


class Box(NamedTuple):
    """A block of a tensor, and where it lies in something that holds it row-major: a file's chunk, a local tensor."""

    offsets: tuple[int, ...]
    """In the whole tensor."""
    shape: tuple[int, ...]
    home: tuple[int, ...]
    """Shape of what holds it."""
    at: tuple[int, ...]
    """Where it begins there."""


class Transfer(NamedTuple):
    """Runs of bytes at regular distances; without ``counts`` it is one run. All numbers are bytes."""

    source: int
    """Where the first run begins in what holds the source."""
    target: int
    nbytes: int
    """Of each run."""
    counts: tuple[int, ...] = ()
    """How often it is repeated, outermost first."""
    source_strides: tuple[int, ...] = ()
    target_strides: tuple[int, ...] = ()

    @property
    def stop(self) -> int:
        """Return where the last run ends in the source."""
        if not self.counts:
            return self.source + self.nbytes
        steps = zip(self.counts, self.source_strides, strict=True)
        return self.source + sum((count - 1) * stride for count, stride in steps) + self.nbytes

    @property
    def total(self) -> int:
        """Return the bytes of all runs."""
        return math.prod(self.counts) * self.nbytes


def whole(shape: Sequence[int]) -> Box:
    """Return the box that is all of a tensor."""
    zeros = (0,) * len(shape)
    return Box(zeros, tuple(shape), tuple(shape), zeros)


def transfer(source: Box, target: Box, *, bits: int) -> Transfer | None:
    """Return what goes from one box to the other; None where they have nothing in common.

    Args:
        source: A box.
        target: A box of the same tensor.
        bits: Of an element.
    """
    groups = [(1, 1, 1)]
    """(count, distance in the source, in the target) of elements, innermost first."""
    starts = [0, 0]
    strides = [1, 1]
    for dim in reversed(range(len(source.shape))):
        low = max(source.offsets[dim], target.offsets[dim])
        high = min(source.offsets[dim] + source.shape[dim], target.offsets[dim] + target.shape[dim])
        if low >= high:
            return None
        for side, box in enumerate((source, target)):
            starts[side] += (box.at[dim] + low - box.offsets[dim]) * strides[side]
        count, inner_source, inner_target = groups[-1]
        if high - low > 1:
            if (count * inner_source, count * inner_target) == (strides[0], strides[1]):
                groups[-1] = count * (high - low), inner_source, inner_target
            else:
                groups.append((high - low, strides[0], strides[1]))
        for side, box in enumerate((source, target)):
            strides[side] *= box.home[dim]
    outer = groups[:0:-1]
    return Transfer(
        starts[0] * bits // 8,
        starts[1] * bits // 8,
        groups[0][0] * bits // 8,
        tuple(count for count, _, _ in outer),
        tuple(stride * bits // 8 for _, stride, _ in outer),
        tuple(stride * bits // 8 for _, _, stride in outer),
    )


def cut(part: Transfer, start: int, stop: int) -> Iterator[Transfer]:
    """Yield what of a transfer has its source in ``[start, stop)``: few transfers, however many runs there are."""
    if start <= part.source and part.stop <= stop:
        yield part
    elif part.counts:
        yield from _cut_runs(part, start, stop)
    else:
        low, high = max(start, part.source), min(stop, part.source + part.nbytes)
        if low < high:
            yield Transfer(low, part.target + low - part.source, high - low)


def _cut_runs(part: Transfer, start: int, stop: int) -> Iterator[Transfer]:
    stride, count = part.source_strides[0], part.counts[0]
    extent = _inner(part, 0).stop - part.source
    begin, end = start - part.source, stop - part.source
    first = min(max(0, (begin - extent) // stride + 1), count)
    last = max(first, min(count, -(-end // stride)))
    whole_first = min(max(first, -(-begin // stride)), last)
    whole_last = max(whole_first, min(last, (end - extent) // stride + 1))
    for index in range(first, whole_first):
        yield from cut(_inner(part, index), start, stop)
    if whole_last - whole_first == 1:
        yield _inner(part, whole_first)
    elif whole_last > whole_first:
        inner = _inner(part, whole_first)
        counts = (whole_last - whole_first, *inner.counts)
        yield part._replace(source=inner.source, target=inner.target, counts=counts)
    for index in range(whole_last, last):
        yield from cut(_inner(part, index), start, stop)


def _inner(part: Transfer, index: int) -> Transfer:
    return Transfer(
        part.source + index * part.source_strides[0],
        part.target + index * part.target_strides[0],
        part.nbytes,
        part.counts[1:],
        part.source_strides[1:],
        part.target_strides[1:],
    )
