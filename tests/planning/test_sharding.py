"""The rule by which tensors are cut over a mesh."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiockpt.planning.sharding import Chunk, Cut, Sharding, shard_order


def sharding(mesh: tuple[int, ...], *cuts: Cut) -> Sharding:
    return Sharding(mesh, tuple(range(math.prod(mesh))), cuts)


def local(full: np.ndarray, rule: Sharding, coordinate: tuple[int, ...]) -> np.ndarray:
    """The local tensor, put together from the boxes."""
    found = np.full(rule.local_shape(full.shape, coordinate), -1)
    for chunk in rule.chunks(full.shape, coordinate):
        found[box(chunk.local_offsets, chunk.shape)] = full[box(chunk.offsets, chunk.shape)]
    return found


def box(offsets: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + length) for offset, length in zip(offsets, shape, strict=True))


@pytest.mark.parametrize(("length", "parts"), [(8, 4), (7, 4), (5, 4), (3, 4), (1, 4), (0, 4), (9, 2), (1, 1), (10, 3)])
def test_parts_are_those_of_torch_chunk(length: int, parts: int) -> None:
    """Equal but for the last ones, which may be shorter or empty."""
    rule = sharding((parts,), Cut(0, 0))
    size = -(-length // parts)
    expected = [list(range(length))[size * at : size * (at + 1)] for at in range(parts)]
    assert [local(np.arange(length), rule, (at,)).tolist() for at in range(parts)] == expected


def test_a_later_cut_cuts_what_the_earlier_one_left() -> None:
    """FSDP over tensor parallelism: the right mesh dimension first, as in torch's documentation."""
    rule = sharding((2, 2), *shard_order((2, 2), [(0, 2), (0, 1)]))
    assert rule.cuts == (Cut(1, 0), Cut(0, 0))
    assert {at: rule.chunks((8,), at)[0].offsets for at in itertools.product((0, 1), (0, 1))} == {
        (0, 0): (0,),
        (0, 1): (4,),
        (1, 0): (2,),
        (1, 1): (6,),
    }
    assert [rule.local_shape((5,), at) for at in itertools.product((0, 1), (0, 1))] == [(2,), (1,), (1,), (1,)]


@pytest.mark.parametrize(
    ("mesh", "placed", "order"),
    [
        ((4, 3, 2), [(0, 2), (0, 2), (0, 1)], [2, 0, 1]),
        ((4, 3, 2), [(0, 1), (0, 1), (0, 1)], [0, 1, 2]),
        ((4, 3, 2), [(0, 6), (0, 2), (0, 1)], [2, 1, 0]),
        ((4, 3, 2), [(0, 2), None, (0, 1)], [2, 0]),
        ((2, 2), [(1, 1), (0, 1)], [1, 0]),
    ],
)
def test_split_factors_say_the_order(
    mesh: tuple[int, ...], placed: list[tuple[int, int] | None], order: list[int]
) -> None:
    """The examples of torch's own documentation."""
    assert [cut.mesh_dim for cut in shard_order(mesh, placed)] == order


def test_a_factor_that_is_no_order_is_a_strided_cut() -> None:
    """As a view of a sharded tensor has it; the example of torch's ``_StridedShard``."""
    rule = sharding((4,), *shard_order((4,), [(0, 2)]))
    assert rule.cuts == (Cut(0, 0, 2),)
    assert [local(np.arange(9), rule, (at,)).tolist() for at in range(4)] == [[0, 1, 5], [2, 3, 6], [4, 7], [8]]
    assert rule.chunks((9,), (0,)) == [Chunk((0,), (2,), (0,)), Chunk((5,), (1,), (2,))]


def test_a_tensor_without_dimensions_is_one_box() -> None:
    """Held by all."""
    rule = sharding((2, 2))
    assert rule.chunks((), (0, 1)) == [Chunk((), (), ())]
    assert rule.replicas == 4
    assert list(rule.owners(3)) == [((0, 0), 3)]


def test_ranks_of_a_mesh_are_not_its_places() -> None:
    """A mesh may hold any ranks of the job, in any order."""
    rule = Sharding((2, 2), (6, 2, 7, 3), (Cut(1, 0),))
    assert rule.coordinate(7) == (1, 0)
    assert rule.coordinate(0) is None
    assert rule.holders((0, 1)) == [2, 3]
    assert list(rule.owners(1)) == [((0, 0), 7), ((0, 1), 3)]


@st.composite
def rules(draw: st.DrawFn) -> tuple[tuple[int, ...], Sharding]:
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    dims = draw(st.permutations(range(len(mesh))))[: draw(st.integers(0, len(mesh)))]
    cuts = tuple(Cut(at, draw(st.integers(0, len(shape) - 1)), draw(st.sampled_from([1, 1, 1, 2, 3]))) for at in dims)
    return shape, Sharding(mesh, tuple(range(math.prod(mesh))), cuts)


@given(rules())
def test_every_element_stands_at_one_owner(case: tuple[tuple[int, ...], Sharding]) -> None:
    """The owners' boxes cover the tensor once, and a rank's boxes cover its local tensor once."""
    shape, rule = case
    seen = np.zeros(shape, dtype=int)
    for coordinate, rank in rule.owners(0):
        assert rule.coordinate(rank) == coordinate
        own = np.zeros(rule.local_shape(shape, coordinate), dtype=int)
        for chunk in rule.chunks(shape, coordinate):
            assert math.prod(chunk.shape) > 0
            seen[box(chunk.offsets, chunk.shape)] += 1
            own[box(chunk.local_offsets, chunk.shape)] += 1
        assert (own == 1).all()
    assert (seen == 1).all()


@given(rules(), st.data())
def test_holders_hold_the_same(case: tuple[tuple[int, ...], Sharding], data: st.DataObject) -> None:
    """Replicas have equal boxes, and each part has as many."""
    shape, rule = case
    rank = data.draw(st.sampled_from(rule.ranks))
    coordinate = rule.coordinate(rank)
    assert coordinate is not None
    holders = rule.holders(coordinate)
    assert rank in holders
    assert len(holders) == rule.replicas
    for other in holders:
        there = rule.coordinate(other)
        assert there is not None
        assert rule.chunks(shape, there) == rule.chunks(shape, coordinate)
