"""Shares: alike on all ranks, and even."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from aiockpt.planning.placings import UNDECLARED, Placing, replicated
from aiockpt.planning.sharding import Cut, Sharding
from aiockpt.planning.shares import share_out

SIZES = st.lists(st.integers(0, 1000) | st.sampled_from([4096, 1 << 20]), max_size=60)


def keys(count: int) -> list[tuple[str, str]]:
    return [("m", f"t{number:03d}") for number in range(count)]


@given(SIZES, st.integers(1, 70))
def test_no_share_exceeds_the_mean_and_the_largest(sizes: list[int], world: int) -> None:
    """Every rank gets at most the mean plus the largest tensor."""
    replicas = share_out(keys(len(sizes)), sizes, [replicated(world)], [0] * len(sizes))
    shares = [0] * world
    for size, replica in zip(sizes, replicas, strict=True):
        shares[replica] += size
    assert all(share <= sum(sizes) / world + max(sizes, default=0) for share in shares)


@given(SIZES, st.randoms(use_true_random=False))
def test_the_order_of_entries_does_not_matter(sizes: list[int], random: Any) -> None:
    """A rank that met its tensors in another order works out the same."""
    order = list(range(len(sizes)))
    random.shuffle(order)
    names = keys(len(sizes))
    placings: list[Placing] = [replicated(3)]
    first = share_out(names, sizes, placings, [0] * len(sizes))
    again = share_out([names[i] for i in order], [sizes[i] for i in order], placings, [0] * len(sizes))
    assert [first[i] for i in order] == again


def test_groups_are_those_of_one_mesh_and_its_cuts() -> None:
    """What other ranks hold has no part in it, nor has what nobody declared or nobody else holds."""
    hybrid = Sharding((2, 2), (0, 1, 2, 3), (Cut(1, 0),))
    other_dim = Sharding((2, 2), (0, 1, 2, 3), (Cut(1, 1),))
    alone = Sharding((4,), (0, 1, 2, 3), (Cut(0, 0),))
    placings: list[Placing] = [hybrid, other_dim, alone, UNDECLARED, replicated(4)]
    assert share_out(keys(6), [9, 8, 7, 7, 9, 8], placings, [0, 1, 2, 3, 4, 4]) == [0, 1, 0, 0, 0, 1]


def test_equal_sizes_go_by_name() -> None:
    """Ties have one order on all ranks."""
    names = [("m", "c"), ("m", "a"), ("l", "z"), ("m", "b")]
    assert share_out(names, [5] * 4, [replicated(4)], [0] * 4) == [3, 1, 0, 2]
