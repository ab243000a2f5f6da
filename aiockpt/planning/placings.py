"""Where a tensor of a job of several ranks is, in the planner's terms; the manifest's records of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Final, Literal

from aiockpt.format.placings import ShardingRecord
from aiockpt.planning.sharding import Cut, Sharding

__all__ = [
    "PER_RANK",
    "UNDECLARED",
    "Placing",
    "intern_placings",
    "only_of",
    "replicated",
    "sharding_of",
    "sharding_record",
]

PER_RANK: Final = "per_rank"
"""Each rank has its own under the same name."""
UNDECLARED: Final = None
"""Nobody said whether ranks hold the same: each stages the whole, contents are compared, one writes."""

Placing = Sharding | Literal["per_rank"] | None


def only_of(rank: int) -> Sharding:
    """Return the placing of what several ranks have, and one of them writes: theirs differ, and that is right."""
    return Sharding((1,), (rank,), ())


def replicated(world: int) -> Sharding:
    """Return the placing of what all ranks hold alike, declared to be so."""
    return Sharding((world,), tuple(range(world)), ())


def intern_placings(placings: Sequence[Placing]) -> tuple[list[Placing], list[int]]:
    """Return the distinct placings in the order in which they are met, and the number of each.

    Tensors of one mesh mostly have one sharding, or one tuple of ranks at least: it is hashed once, not for each.
    """
    distinct: dict[Placing, int] = {}
    known: dict[object, int] = {}
    numbers = []
    for placing in placings:
        number = known.get(id(placing))
        if number is None:
            near = (placing.mesh, id(placing.ranks), placing.cuts) if isinstance(placing, Sharding) else placing
            number = known.get(near)
            if number is None:
                number = known[near] = distinct.setdefault(placing, len(distinct))
            known[id(placing)] = number
        numbers.append(number)
    return list(distinct), numbers


def sharding_record(sharding: Sharding) -> ShardingRecord:
    """Return what a manifest says of a sharding."""
    mesh, ranks, cuts = sharding
    strides = _strides(mesh, ranks)
    first, listed = (0, list(ranks)) if strides is None else (ranks[0], [])
    return ShardingRecord(
        mesh=list(mesh),
        cuts=[(cut.mesh_dim, cut.dim, cut.stride_parts) for cut in cuts],
        first=first,
        strides=strides or [],
        ranks=listed,
    )


def sharding_of(record: ShardingRecord) -> Sharding:
    """Return the sharding of a record that was checked."""
    ranks = tuple(record.ranks)
    if record.strides:
        steps = [range(0, length * stride, stride) for length, stride in zip(record.mesh, record.strides, strict=True)]
        ranks = tuple(record.first + sum(place) for place in itertools.product(*steps))
    return Sharding(tuple(record.mesh), ranks, tuple(Cut(*cut) for cut in record.cuts))


def _strides(mesh: Sequence[int], ranks: Sequence[int]) -> list[int] | None:
    """Return by how much the rank grows along each mesh dimension; None where that is no rule."""
    strides = []
    below = math.prod(mesh)
    for length in mesh:
        below //= length
        strides.append(ranks[below] - ranks[0] if length > 1 else 1)
    if min(strides) < 1:
        return None
    steps = [range(0, length * stride, stride) for length, stride in zip(mesh, strides, strict=True)]
    expected = map(sum, itertools.product(*steps))
    return strides if all(rank == ranks[0] + at for rank, at in zip(ranks, expected, strict=True)) else None
