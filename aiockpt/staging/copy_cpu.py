"""Copying CPU tensors into the arena, cut into units that release the GIL.

Large tensors go by ``memmove``: torch's own parallel copy is as fast on an idle machine (18.6 GB/s with two cores,
measured, against 18.1 for two threads that share ``memmove`` units and 14.9 for one), but each of its parallel
regions waits for the slowest thread of a pool, which on a loaded machine made the same copy 10 times slower. Small
tensors go by ``torch._foreach_copy_`` into kept views, many in one call: 8 ms for 10,000 of 4 KiB.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from aiockpt.staging.layout import Layout, plain
from aiockpt.staging.pending import Lazy, PendingCopies
from aiockpt.staging.progress import Progress

__all__ = ["PIECE_NBYTES", "Unit", "copy_later", "units"]

PIECE_NBYTES = 8 << 20
"""Bytes between two looks at the world (progress, cancel, pointers): 0.6 ms, and not below where memcpy is fastest."""
_BATCHED_NUMEL = 32_768
"""torch copies tensors of at most so many elements without its thread pool, so many of them go into one call."""


class Unit(NamedTuple):
    """A part of the copying that any thread may make, about ``PIECE_NBYTES`` long."""

    positions: Sequence[int]
    """What is complete when this unit and all before it are; one position that is not where ``upto`` is set."""
    upto: int
    """Bytes of the one position that are copied then; 0 where all positions are complete."""
    targets: list[torch.Tensor]
    sources: list[torch.Tensor]
    """Copied by torch; empty where the next three say what to move."""
    target: int = 0
    source: int = 0
    nbytes: int = 0

    def copy(self) -> None:
        """Make this part of the copy."""
        if self.nbytes:
            ctypes.memmove(self.target, self.source, self.nbytes)
        else:
            torch._foreach_copy_(self.targets, self.sources)


def units(
    positions: Sequence[int], tensors: list[torch.Tensor], layout: Layout, *, piece_nbytes: int = PIECE_NBYTES
) -> list[Unit]:
    """Cut the copying of tensors into units.

    Args:
        positions: Places in the plan's file order, rising.
        tensors: One for each position, on the CPU, any strides.
        layout: Where they go.
        piece_nbytes: Bytes of a unit; more only for a large tensor that is not contiguous.

    Returns:
        The units in file order; they hold the tensors.
    """
    targets = layout.destinations(positions, tensors)
    sources = layout.sources(tensors)
    sizes = layout.sizes
    found: list[Unit] = []
    first = nbytes = 0
    for at, position in enumerate(positions):
        size = sizes[position]
        alone = size > 65_536 and _is_large(sources[at])
        if at > first and (alone or nbytes + size > piece_nbytes):
            found.append(Unit(positions[first:at], 0, targets[first:at], sources[first:at]))
            first, nbytes = at, 0
        if alone:
            found += _large_units(position, targets[at], sources[at], size, layout, piece_nbytes)
            first = at + 1
        else:
            nbytes += size
    if first < len(positions):
        found.append(Unit(positions[first:], 0, targets[first:], sources[first:]))
    return found


def _is_large(tensor: torch.Tensor) -> bool:
    return tensor.numel() > _BATCHED_NUMEL


def _large_units(
    position: int, target: torch.Tensor, source: torch.Tensor, size: int, layout: Layout, piece_nbytes: int
) -> Iterator[Unit]:
    if not source.is_contiguous():
        yield Unit([position], 0, [target], [source])
        return
    to = layout.arena.address + layout.plan.offsets[layout.order[position]]
    address = source.data_ptr()
    for start in range(0, size, piece_nbytes):
        stop = min(start + piece_nbytes, size)
        upto = stop if stop < size else 0
        yield Unit([position], upto, [target], [source], to + start, address + start, stop - start)


def copy_later(
    lazies: Iterable[Lazy],
    layout: Layout,
    progress: Progress,
    pending: PendingCopies,
    *,
    piece_nbytes: int = PIECE_NBYTES,
) -> None:
    """Copy contiguous tensors behind the trainer's back, until all are staged or ``pending`` is stopped.

    The GIL is released for each piece, and taken once per piece: where training is busy in Python, each taking waits
    for the interpreter's switch interval (5 ms), so small tensors go together.

    Args:
        lazies: CPU tensors in file order.
        layout: Where they go.
        progress: Told of each piece.
        pending: Told of each tensor, which lets its memory go.
        piece_nbytes: Bytes copied between two looks at ``pending``.
    """
    for group in _groups(lazies, piece_nbytes):
        if pending.stopped:
            return
        if len(group) > 1:
            _copy_group(group, layout, pending)
        elif not _copy_one(group[0], layout, progress, pending, piece_nbytes):
            return
        pending.staged(group)
        progress.copied([lazy.position for lazy in group])


def _groups(lazies: Iterable[Lazy], piece_nbytes: int) -> Iterator[list[Lazy]]:
    group: list[Lazy] = []
    nbytes = 0
    for lazy in lazies:
        alone = lazy.tensor is None or _is_large(lazy.tensor)
        if group and (alone or nbytes + lazy.nbytes > piece_nbytes):
            yield group
            group, nbytes = [], 0
        if alone:
            yield [lazy]
            continue
        group.append(lazy)
        nbytes += lazy.nbytes
    if group:
        yield group


def _copy_group(group: list[Lazy], layout: Layout, pending: PendingCopies) -> None:
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    for lazy in group:
        if lazy.tensor is None or not lazy.in_place():
            pending.tear(lazy)
            continue
        targets.append(layout.destination(lazy.position, lazy.tensor))
        sources.append(plain(lazy.tensor))
    if targets:
        torch._foreach_copy_(targets, sources)


def _copy_one(lazy: Lazy, layout: Layout, progress: Progress, pending: PendingCopies, piece_nbytes: int) -> bool:
    target = layout.arena.address + layout.plan.offsets[lazy.part]
    for start in range(0, lazy.nbytes, piece_nbytes):
        if pending.stopped:
            return False
        # A storage that was resized has freed its memory; reading there could end the process.
        if not lazy.in_place():
            pending.tear(lazy)
            return True
        nbytes = min(piece_nbytes, lazy.nbytes - start)
        ctypes.memmove(target + start, lazy.address + start, nbytes)
        pending.moved()
        if start + nbytes < lazy.nbytes:
            progress.partly(lazy.position, start + nbytes)
    return True
