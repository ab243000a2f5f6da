"""Which blocks of which tensors one rank writes, and in how many files: from a body and a rank alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from aiockpt.planning.body import Columns
from aiockpt.planning.placings import Placing
from aiockpt.planning.sharding import Chunk, Sharding

__all__ = ["Block", "Seat", "divide", "first_owner", "seat_of"]


class Seat(NamedTuple):
    """Where a rank stands in a mesh, for tensors that are cut over some of its dimensions."""

    coordinate: tuple[int, ...]
    replica: int
    """Which of the ranks that hold the same it is."""
    is_first: bool
    """Whether it holds the first part."""


class Block(NamedTuple):
    """A box of a tensor that a rank writes."""

    entry: int
    """Number in the body."""
    chunk: Chunk
    is_whole: bool


def seat_of(sharding: Sharding, rank: int) -> Seat | None:
    """Return the rank's place in a mesh; None where it has none."""
    coordinate = sharding.coordinate(rank)
    if coordinate is None:
        return None
    cut = {cut.mesh_dim for cut in sharding.cuts}
    replica = 0
    for dim, (length, at) in enumerate(zip(sharding.mesh, coordinate, strict=True)):
        if dim not in cut:
            replica = replica * length + at
    return Seat(coordinate, replica, not any(coordinate[dim] for dim in cut))


def first_owner(sharding: Sharding, replica: int) -> int:
    """Return the rank that writes the first part of what ``replica`` writes."""
    cut = {cut.mesh_dim for cut in sharding.cuts}
    index, below = 0, 1
    for dim in reversed(range(len(sharding.mesh))):
        length = sharding.mesh[dim]
        if dim not in cut:
            replica, at = divmod(replica, length)
            index += at * below
        below *= length
    return sharding.ranks[index]


def divide(columns: Columns, replicas: Sequence[int], rank: int) -> list[list[Block]]:
    """Return what of the declared tensors the rank writes.

    Returns:
        First boxes, then second boxes of those that are not one, and so on: a file has a tensor's name once.
    """
    body = columns.body
    seats = [seat_of(placing, rank) if isinstance(placing, Sharding) else None for placing in columns.placings]
    found: dict[tuple[int, int], list[Chunk]] = {}
    layers: list[list[Block]] = [[]]
    rows = zip(body.entry_classes, body.entry_placings, replicas, strict=True)
    for entry, (kind, placing, replica) in enumerate(rows):
        seat = seats[placing]
        if seat is None or seat.replica != replica:
            continue
        case = kind, placing
        chunks = found.get(case)
        if chunks is None:
            chunks = found[case] = _chunks(columns.placings[placing], body.classes[kind][1], seat)
        shape = None
        for depth, chunk in enumerate(chunks):
            if depth == len(layers):
                layers.append([])
            shape = shape or tuple(body.classes[kind][1])
            layers[depth].append(Block(entry, chunk, chunk.shape == shape))
    return layers


def _chunks(placing: Placing, shape: Sequence[int], seat: Seat) -> list[Chunk]:
    assert isinstance(placing, Sharding), "only those have seats"
    if math.prod(shape):
        return placing.chunks(shape, seat.coordinate)
    # Without bytes there is nothing to cut; somebody has to say that it is there.
    zeros = (0,) * len(shape)
    return [Chunk(zeros, tuple(shape), zeros)] if seat.is_first else []
