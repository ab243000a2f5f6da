"""Which bytes go where, by arithmetic alone: any pair of shardings, any cut into blocks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from aiockpt.planning.sharding import Cut, Sharding
from aiockpt.restoring.boxes import Box, Transfer, cut, transfer, whole


def moved(part: Transfer) -> Iterator[tuple[int, int]]:
    """Yield (source byte, target byte) of every byte of a transfer."""
    for place in itertools.product(*(range(count) for count in part.counts)):
        source = part.source + sum(at * stride for at, stride in zip(place, part.source_strides, strict=True))
        target = part.target + sum(at * stride for at, stride in zip(place, part.target_strides, strict=True))
        yield from ((source + byte, target + byte) for byte in range(part.nbytes))


@st.composite
def shardings(draw: st.DrawFn, dims: int) -> Sharding:
    """Any mesh of one or two dimensions, uneven and strided cuts among them."""
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    cutting = [mesh_dim for mesh_dim in draw(st.permutations(range(len(mesh)))) if dims and draw(st.booleans())]
    cuts = [Cut(at, draw(st.integers(0, dims - 1)), draw(st.sampled_from((1, 1, 2, 3)))) for at in cutting]
    return Sharding(mesh, tuple(range(math.prod(mesh))), tuple(cuts))


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], Sharding, Sharding]:
    """A shape, how it was saved, and how it is wanted."""
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=3)))
    return shape, draw(shardings(len(shape))), draw(shardings(len(shape)))


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from((1, 4)), st.integers(1, 40))
def test_every_byte_arrives_once_from_any_sharding_in_any_other(
    case: tuple[tuple[int, ...], Sharding, Sharding], itemsize: int, block: int
) -> None:
    """Chunks are cut into blocks at any byte, too."""
    shape, saved, wanted = case
    content = {index: number for number, index in enumerate(itertools.product(*map(range, shape)))}
    for coordinate, _ in wanted.owners(0):
        local_shape = wanted.local_shape(shape, coordinate)
        targets = [
            Box(chunk.offsets, chunk.shape, local_shape, chunk.local_offsets)
            for chunk in wanted.chunks(shape, coordinate)
        ]
        local: dict[int, tuple[int, int]] = {}
        for place, _ in saved.owners(0):
            for chunk in saved.chunks(shape, place):
                source = whole(chunk.shape)._replace(offsets=chunk.offsets)
                inner = list(itertools.product(*map(range, chunk.shape)))
                stored = [content[tuple(map(sum, zip(chunk.offsets, at, strict=True)))] for at in inner]
                for target in targets:
                    part = transfer(source, target, bits=8 * itemsize)
                    if part is None:
                        continue
                    pieces = []
                    for start in range(0, len(stored) * itemsize, block):
                        here = list(cut(part, start, start + block))
                        assert all(start <= piece.source and piece.stop <= start + block for piece in here)
                        assert len(here) <= 2 * len(shape) + 1
                        pieces += here
                    assert sum(piece.total for piece in pieces) == part.total
                    for piece in pieces:
                        for source_byte, target_byte in moved(piece):
                            assert target_byte not in local
                            number, byte = divmod(source_byte, itemsize)
                            local[target_byte] = stored[number], byte
        expected = {}
        for chunk in wanted.chunks(shape, coordinate):
            for at in itertools.product(*map(range, chunk.shape)):
                there = content[tuple(map(sum, zip(chunk.offsets, at, strict=True)))]
                index = 0
                for length, begin, step in zip(local_shape, chunk.local_offsets, at, strict=True):
                    index = index * length + begin + step
                expected |= {index * itemsize + byte: (there, byte) for byte in range(itemsize)}
        assert local == expected


def test_columns_of_a_matrix_are_one_transfer() -> None:
    """However many rows it has: nothing is listed run by run."""
    source = Box((0, 1024), (4096, 1024), (4096, 1024), (0, 0))
    part = transfer(source, whole((4096, 4096)), bits=32)
    assert part == Transfer(0, 4096, 4096, (4096,), (4096,), (16384,))
    assert list(cut(part, 0, 16 << 20)) == [part]
    assert [piece.total for piece in cut(part, 100, 10000)] == [3996, 4096, 1808]


def test_rows_of_a_matrix_are_one_run() -> None:
    """Full rows lie one behind the other on both sides."""
    part = transfer(Box((2, 0), (3, 5), (3, 5), (0, 0)), Box((3, 0), (4, 5), (4, 5), (0, 0)), bits=16)
    assert part == Transfer(10, 0, 20)


def test_float4_counts_in_half_bytes() -> None:
    """Two elements in a byte."""
    assert transfer(whole((3, 8)), whole((3, 8)), bits=4) == Transfer(0, 0, 12)
