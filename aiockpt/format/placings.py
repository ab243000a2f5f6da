"""How a tensor was cut over ranks, as a manifest says it: a rule with a few numbers, never a list of its parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

__all__ = ["MAX_RANKS", "PlacingRecord", "ShardingRecord", "check_placing"]

MAX_RANKS = 1 << 20
"""Of a sharded checkpoint: what a reader expands from a few numbers stays small."""
_MAX_DIMS = 64
"""Of a mesh and of cuts; torch's tensors have as many at most."""
_MAX_STRIDE_PARTS = 1 << 20
"""As many runs may one strided cut make."""

_Positive = Annotated[int, msgspec.Meta(ge=1, le=MAX_RANKS)]
_Number = Annotated[int, msgspec.Meta(ge=0, le=MAX_RANKS)]


class ShardingRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The rule of ``planning.sharding.Sharding``.

    The rank at coordinate ``at`` is ``first + sum(at[d] * strides[d])`` where there are ``strides``, else
    ``ranks[row-major index of at]``.
    """

    mesh: Annotated[list[_Positive], msgspec.Meta(min_length=1, max_length=_MAX_DIMS)]
    """Length of each mesh dimension."""
    cuts: Annotated[
        list[tuple[_Number, _Number, Annotated[int, msgspec.Meta(ge=1, le=_MAX_STRIDE_PARTS)]]],
        msgspec.Meta(max_length=_MAX_DIMS),
    ] = []
    """(mesh dimension, tensor dimension, stride parts) in the order in which they are made; none: all hold all."""
    first: _Number = 0
    strides: list[_Positive] = []
    ranks: list[_Number] = []

    @property
    def replicas(self) -> int:
        """How many ranks hold each part."""
        cut = {mesh_dim for mesh_dim, _, _ in self.cuts}
        return math.prod(length for dim, length in enumerate(self.mesh) if dim not in cut)


PlacingRecord = ShardingRecord | Literal["undeclared", "per_rank"]


def check_placing(record: PlacingRecord, *, world: int) -> None:
    """Check that a mesh has each of its ranks once and inside of the world; expands nothing.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(record, ShardingRecord):
        return
    count = math.prod(record.mesh)
    if count > min(world, MAX_RANKS):
        raise ValueError(f"a mesh has {count} places, the job had {world} ranks")
    if record.strides:
        if record.ranks or len(record.strides) != len(record.mesh) or not _are_distinct(record.mesh, record.strides):
            raise ValueError("a mesh has a rank twice")
        last = record.first + sum((n - 1) * stride for n, stride in zip(record.mesh, record.strides, strict=True))
    else:
        if len(record.ranks) != count or len(set(record.ranks)) != count:
            raise ValueError(f"a mesh of {count} places has {len(record.ranks)} ranks, or one twice")
        last = max(record.ranks)
    if last >= world:
        raise ValueError(f"a mesh has rank {last}, the job had {world}")
    mesh_dims = [mesh_dim for mesh_dim, _, _ in record.cuts]
    if len(set(mesh_dims)) < len(mesh_dims) or any(dim >= len(record.mesh) for dim in mesh_dims):
        raise ValueError("a mesh dimension cuts twice, or is not there")


def _are_distinct(lengths: Sequence[int], strides: Sequence[int]) -> bool:
    """Tell whether the places are a mixed-radix number: each stride reaches over all that smaller ones count."""
    reach = 0
    for stride, length in sorted(zip(strides, lengths, strict=True)):
        if length == 1:
            continue
        if stride <= reach:
            return False
        reach += stride * (length - 1)
    return True
