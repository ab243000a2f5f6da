"""A DTensor → the local tensor, and the rule by which the whole one is cut over the ranks."""

from __future__ import annotations

import sys
import weakref
from typing import Any, NamedTuple

import torch

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.names import Segments, dotted
from aiockpt.planning.sharding import Cut, Sharding, shard_order

__all__ = ["Sharded", "is_sharded", "read_sharded"]

_meshes: weakref.WeakKeyDictionary[Any, tuple[tuple[int, ...], tuple[int, ...]]] = weakref.WeakKeyDictionary()
"""(lengths, global ranks) of the device meshes that were met: asking one of them takes 20 µs."""


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
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise _refused(tensor, path, "this rank is not part of its mesh")
    lengths, ranks = _mesh(mesh)
    sharding = Sharding(lengths, ranks, _cuts(tensor, lengths, path))
    local = tensor._local_tensor
    if hasattr(local, "wait"):  # of a collective that is still under way
        local = local.wait()
    shape = tuple(tensor.shape)
    expected = sharding.local_shape(shape, coordinate)
    if tuple(local.shape) != expected:
        why = f"{tensor.placements} of {list(shape)} is {list(expected)} here, and its local tensor {list(local.shape)}"
        raise _refused(tensor, path, why)
    return Sharded(local, shape, sharding, tuple(coordinate))


def _mesh(mesh: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    found = _meshes.get(mesh)
    if found is None:
        ranks = mesh.mesh
        found = _meshes[mesh] = tuple(ranks.shape), tuple(ranks.flatten().tolist())
    return found


def _cuts(tensor: Any, lengths: tuple[int, ...], path: Segments) -> tuple[Cut, ...]:
    spec = tensor._spec
    if not getattr(spec, "use_strided_shard_as_shard_order", True) and spec.shard_order is not None:
        placed = [_placed(placement, tensor, path) for placement in spec.placements]
        ordered = [Cut(mesh_dim, entry.tensor_dim) for entry in spec.shard_order for mesh_dim in entry.mesh_dims]
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
    raise _refused(tensor, path, f"it is {what}")


def _refused(tensor: Any, path: Segments, why: str) -> UnsupportedValueError:
    key = dotted(path)
    return UnsupportedValueError(
        f"{key!r} cannot be saved: a DTensor of {tensor.dtype} on {tensor.device_mesh}",
        why=why,
        next="redistribute it to Shard and Replicate placements, or leave it out",
        key=key,
        type_name=f"DTensor[{str(tensor.dtype).removeprefix('torch.')}]",
    )
