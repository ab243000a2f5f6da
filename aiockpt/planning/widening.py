"""A mesh that is a slice of a larger one → the larger one, whose further ranks hold replicas.

``fully_shard`` over the data-parallel slice of a mesh leaves what tensor parallelism did not cut on that slice: as many
meshes as there are slices, and one tensor on each. It is one tensor on all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from aiockpt.planning.sharding import Sharding

__all__ = ["widen", "widened"]


def widen(shardings: Sequence[Sharding]) -> list[Sharding]:
    """Return each sharding on the largest mesh among them of which its own is a slice; as it is where there is none.

    Args:
        shardings: Of tensors that belong together: where none of them is on a larger mesh, the ranks beside a slice are
            taken to hold something else, as the stages of a pipeline do.
    """
    meshes = sorted({(one.mesh, one.ranks) for one in shardings}, key=lambda grid: (-len(grid[1]), grid))
    found = []
    for one in shardings:
        larger = (widened(one, *grid) for grid in meshes if len(grid[1]) > len(one.ranks))
        found.append(next((wide for wide in larger if wide is not None), one))
    return found


def widened(sharding: Sharding, mesh: tuple[int, ...], ranks: tuple[int, ...]) -> Sharding | None:
    """Return the same cuts on a larger mesh; None where the sharding's own is no slice of it.

    Args:
        sharding: Any.
        mesh: Lengths of the larger one.
        ranks: Its ranks, row-major.
    """
    places = dict(zip(ranks, itertools.product(*map(range, mesh)), strict=True))
    if not places.keys() >= set(sharding.ranks):
        return None
    first = places[sharding.ranks[0]]
    at: dict[int, int] = {}
    """By mesh dimension of the slice: that of the larger mesh. One of length 1 cuts nothing, and needs none."""
    below = math.prod(sharding.mesh)
    for dim, length in enumerate(sharding.mesh):
        below //= length
        if length > 1:
            second = places[sharding.ranks[below]]
            moved = [wide for wide, (one, other) in enumerate(zip(first, second, strict=True)) if one != other]
            if len(moved) != 1 or moved[0] in at.values() or mesh[moved[0]] != length:
                return None
            at[dim] = moved[0]
    for rank, place in zip(sharding.ranks, itertools.product(*map(range, sharding.mesh)), strict=True):
        expected = list(first)
        for dim, wide in at.items():
            expected[wide] = place[dim]
        if places[rank] != tuple(expected):
            return None
    return Sharding(
        mesh, ranks, tuple(cut._replace(mesh_dim=at[cut.mesh_dim]) for cut in sharding.cuts if cut.mesh_dim in at)
    )
