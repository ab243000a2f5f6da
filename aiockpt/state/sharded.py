"""A DTensor → the local tensor, and the rule by which the whole one is cut over the ranks."""

from __future__ import annotations

import sys
import weakref
from typing import Any, NamedTuple

import torch

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.names import Segments, dotted
from aiockpt.planning.sharding import Cut, Sharding, shard_order

__all__ = ["Sharded", "is_sharded", "read_sharded", "refuse_dtensor"]

_MOST_SHAPES = 10_000
"""Local shapes that a rule remembers."""


class _Rule(NamedTuple):
    """What placements on a mesh mean on this rank."""

    sharding: Sharding
    coordinate: tuple[int, ...]
    shapes: dict[tuple[int, ...], tuple[int, ...]]
    """By shape of the whole tensor: that of the local one."""


_rules: weakref.WeakKeyDictionary[Any, dict[Any, _Rule]] = weakref.WeakKeyDictionary()
"""By device mesh and placements, of those that were met: working one out takes 50 µs, and a state has thousands of
tensors with few rules."""


class Sharded(NamedTuple):
    """A DTensor as a save and a restore need it."""

    local: torch.Tensor
    """The live memory of this rank."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    sharding: Sharding
    coordinate: tuple[int, ...]
    """Of this rank in the mesh."""


def is_sharded(tensor: torch.Tensor) -> bool:
    """Tell whether it is a DTensor; imports nothing."""
    home = sys.modules.get("torch.distributed.tensor")
    return home is not None and isinstance(tensor, home.DTensor)


def read_sharded(tensor: Any, path: Segments) -> Sharded:
    """Read a DTensor without any communication.

    Args:
        tensor: A DTensor.
        path: Where it stands in the state, for errors.

    Raises:
        UnsupportedValueError: It is partial, of a placement that is not torch's, on a mesh without this rank, or its
            local tensor has another shape than the rule says.
    """
    rule = _rule_of(tensor, path)
    local = tensor._local_tensor
    if type(local) is not torch.Tensor and hasattr(local, "wait"):  # of a collective that is still under way
        local = local.wait()
    shape = tuple(tensor.shape)
    expected = rule.shapes.get(shape)
    if expected is None:
        if len(rule.shapes) >= _MOST_SHAPES:
            rule.shapes.clear()
        expected = rule.shapes[shape] = rule.sharding.local_shape(shape, rule.coordinate)
    if local.shape != expected:
        why = f"{tensor.placements} of {list(shape)} is {list(expected)} here, and its local tensor {list(local.shape)}"
        raise refuse_dtensor(tensor, path, why)
    return Sharded(local, shape, rule.sharding, rule.coordinate)


def _rule_of(tensor: Any, path: Segments) -> _Rule:
    spec = tensor._spec
    mesh, placements = spec.mesh, spec.placements
    rules = _rules.get(mesh)
    if rules is None:
        rules = _rules[mesh] = {}
    # With their types: a subclass of somebody's own is equal to the placement that it derives from.
    key = tuple(map(type, placements)), placements, _own_order(spec)
    try:
        rule = rules.get(key)
    except Exception:  # noqa: BLE001  # a placement of somebody's own, which torch lets nobody hash
        rule = None
    if rule is None:
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise refuse_dtensor(tensor, path, "this rank is not part of its mesh")
        grid = mesh.mesh
        # Shardings of one mesh share the tuple of its ranks, which is long.
        known = next((other.sharding for other in rules.values()), None)
        ranks = tuple(grid.flatten().tolist()) if known is None else known.ranks
        lengths = tuple(grid.shape)
        cuts = _cuts(tensor, lengths, path)
        rule = rules[key] = _Rule(Sharding(lengths, ranks, cuts), tuple(coordinate), {})
    return rule


def _own_order(spec: Any) -> Any:
    """Return in which order mesh dimensions cut, where the placements do not say it."""
    return None if getattr(spec, "use_strided_shard_as_shard_order", True) else spec.shard_order


def _cuts(tensor: Any, lengths: tuple[int, ...], path: Segments) -> tuple[Cut, ...]:
    spec = tensor._spec
    order = _own_order(spec)
    if order is not None:
        placed = [_placed(placement, tensor, path) for placement in spec.placements]
        ordered = [Cut(mesh_dim, entry.tensor_dim) for entry in order for mesh_dim in entry.mesh_dims]
        strides = {mesh_dim: factor for mesh_dim, at in enumerate(placed) if at is not None for factor in [at[1]]}
        return tuple(Cut(cut.mesh_dim, cut.dim, strides[cut.mesh_dim]) for cut in ordered)
    return tuple(shard_order(lengths, [_placed(placement, tensor, path) for placement in spec.placements]))


def _placed(placement: Any, tensor: Any, path: Segments) -> tuple[int, int] | None:
    """Return (tensor dimension, split factor), or None for a replica."""
    kinds = sys.modules["torch.distributed.tensor.placement_types"]
    kind = type(placement)
    if kind is kinds.Replicate:
        return None
    if kind is kinds.Shard:
        return placement.dim, 1
    if kind is kinds._StridedShard:
        return placement.dim, int(placement.split_factor)
    what = "partial: its ranks hold summands" if isinstance(placement, kinds.Partial) else f"placed by {placement!r}"
    raise refuse_dtensor(tensor, path, f"it is {what}")


def refuse_dtensor(
    tensor: Any,
    path: Segments,
    why: str,
    next: str = "redistribute it to Shard and Replicate placements, or leave it out",
) -> UnsupportedValueError:
    """Return the error that names a DTensor's key, dtype and mesh."""
    key = dotted(path)
    return UnsupportedValueError(
        f"{key!r} cannot be saved: a DTensor of {tensor.dtype} on {tensor.device_mesh}",
        why=why,
        next=next,
        key=key,
        type_name=f"DTensor[{str(tensor.dtype).removeprefix('torch.')}]",
    )
