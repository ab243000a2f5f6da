"""Slices of a mesh are put on the mesh, and nothing else is."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from aiockpt.planning.sharding import Cut, Sharding
from aiockpt.planning.widening import widen, widened

GRID = (2, 2)
RANKS = (0, 1, 2, 3)


@st.composite
def slices(draw: st.DrawFn) -> tuple[Sharding, Sharding]:
    """A sharding on a mesh that replicates some of its dimensions, and the same on a slice without these."""
    mesh = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)))
    ranks = tuple(draw(st.permutations(range(math.prod(mesh)))))
    kept = sorted(draw(st.sets(st.sampled_from(range(len(mesh))))))
    at = [draw(st.integers(0, length - 1)) for length in mesh]
    axes = [range(length) if dim in kept else [at[dim]] for dim, length in enumerate(mesh)]
    places = dict(zip(itertools.product(*map(range, mesh)), ranks, strict=True))
    narrow = tuple(places[place] for place in itertools.product(*axes))
    cut = [dim for dim in kept if draw(st.booleans())]
    cuts = tuple(Cut(dim, number, draw(st.integers(1, 2))) for number, dim in enumerate(cut))
    inner = tuple(one._replace(mesh_dim=kept.index(one.mesh_dim)) for one in cuts)
    lengths = tuple(mesh[dim] for dim in kept)
    return Sharding(mesh, ranks, cuts), Sharding(lengths or (1,), narrow, inner)


@given(slices(), st.lists(st.integers(0, 7), min_size=4, max_size=4))
def test_every_rank_of_a_slice_holds_the_same_by_either_rule(pair: tuple[Sharding, Sharding], sizes: list[int]) -> None:
    wide, narrow = pair
    found = widened(narrow, wide.mesh, wide.ranks)
    assert found is not None
    for rank in narrow.ranks:
        here, there = narrow.coordinate(rank), found.coordinate(rank)
        assert here is not None
        assert there is not None
        assert narrow.chunks(sizes, here) == found.chunks(sizes, there)
    assert found.replicas == narrow.replicas * len(wide.ranks) // len(narrow.ranks)


def test_what_is_no_slice_stays() -> None:
    """A diagonal, half of a row, another order, ranks from outside."""
    assert widened(Sharding((2,), (0, 3), (Cut(0, 0),)), GRID, RANKS) is None
    assert widened(Sharding((2,), (0, 1), ()), (4,), RANKS) is None
    assert widened(Sharding((2,), (2, 0), (Cut(0, 0),)), GRID, RANKS) is None
    assert widened(Sharding((2,), (3, 4), ()), GRID, RANKS) is None
    assert widened(Sharding((4,), RANKS, ()), GRID, RANKS) is None


def test_only_a_larger_mesh_that_is_there_counts() -> None:
    """The stages of a pipeline have one each, and their tensors are not those of the other stages."""
    cut = Sharding(GRID, RANKS, (Cut(0, 0), Cut(1, 1)))
    column, row = Sharding((2,), (1, 3), (Cut(0, 0),)), Sharding((2,), (0, 1), ())
    other = Sharding((2,), (4, 5), (Cut(0, 0),))
    assert widen([column, cut, row, other]) == [
        Sharding(GRID, RANKS, (Cut(0, 0),)),
        cut,
        Sharding(GRID, RANKS, ()),
        other,
    ]
    assert widen([column, row]) == [column, row]
