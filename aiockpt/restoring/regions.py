"""The memory of this rank that a tensor's bytes go to: all of a plain tensor, the local part of a DTensor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from aiockpt.format.names import Segments
from aiockpt.planning.sharding import Chunk
from aiockpt.restoring.boxes import Box, whole
from aiockpt.state.dtypes import COMPLEX128, PACKED_F4
from aiockpt.state.sharded import is_sharded, read_sharded

__all__ = ["Region", "boxes_of", "local_memory", "region_of"]


class Region(NamedTuple):
    """What of a tensor stands on this rank."""

    memory: torch.Tensor
    chunks: tuple[Chunk, ...] | None
    """Blocks of the whole tensor, in the terms of live shapes; None where the memory is all of it."""


def local_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return the plain tensor that has a tensor's bytes on this rank: a DTensor's local one, any other itself."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    local: torch.Tensor = sharded._local_tensor
    return local.wait() if hasattr(local, "wait") else local


def region_of(tensor: torch.Tensor, path: Segments = ()) -> Region:
    """Return where the bytes of a tensor go.

    Raises:
        UnsupportedValueError: A DTensor that is partial, or of a placement that is not torch's.
    """
    if not is_sharded(tensor):
        return Region(tensor, None)
    local, shape, sharding, coordinate = read_sharded(tensor, path)
    return Region(local, tuple(sharding.chunks(shape, coordinate)) if sharding.cuts else None)


def boxes_of(region: Region, code: str, mark: str, shape: tuple[int, ...]) -> tuple[Box, ...]:
    """Return the boxes of a region in the terms of files.

    Args:
        region: Of a tensor.
        code: Its dtype in the file.
        mark: As in the manifest's classes.
        shape: Of the whole tensor in the file.
    """
    if region.chunks is None:
        return (whole(shape),)
    home = _stored(tuple(region.memory.shape), code, mark, 2)
    return tuple(
        Box(
            _stored(chunk.offsets, code, mark, 0),
            _stored(chunk.shape, code, mark, 2),
            home,
            _stored(chunk.local_offsets, code, mark, 0),
        )
        for chunk in region.chunks
    )


def _stored(numbers: tuple[int, ...], code: str, mark: str, real_parts: int) -> tuple[int, ...]:
    """Return offsets or a shape as files have them; ``real_parts`` is what a complex128 has in its last dimension."""
    if mark == COMPLEX128:
        return (*numbers, real_parts)
    return (*numbers[:-1], numbers[-1] * 2) if code == PACKED_F4 else numbers
