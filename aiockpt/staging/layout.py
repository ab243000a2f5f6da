"""What of a save depends on nothing but its plan and the arena, made once for both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from aiockpt.planning.images import Part
from aiockpt.planning.local import LocalPlan
from aiockpt.staging.arena import ArenaView
from aiockpt.staging.canaries import Points, points

__all__ = ["Layout", "plain"]

_Cut = tuple[tuple[int, int, int], ...]
"""(dimension, first, length) that make a part out of a local tensor; nothing where it is all of it."""

_BYTES_AS_THEY_ARE = frozenset({torch.uint8, torch.int8, torch.bool})


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a one-byte exotic (fp8, fp4) as uint8: not every torch has kernels that copy or join those."""
    if tensor.element_size() == 1 and tensor.dtype not in _BYTES_AS_THEY_ARE:
        return tensor.view(torch.uint8)
    return tensor


class Layout:
    """Places of a plan's parts in one arena, in file order.

    A *position* is an index into ``plan.order``, a *part* one into the plan's columns, an *entry* one into the
    collected tensors, of which a part is a block. With one rank part and entry are the same. Equal plans have equal
    dtypes and shapes, so what is made from the first save's tensors serves all later ones.
    """

    def __init__(self, plan: LocalPlan, arena: ArenaView, *, canary_nbytes: int) -> None:
        self.plan = plan
        self.arena = arena
        self.order = plan.order
        self.entries: Sequence[int] = [plan.parts[part].entry for part in plan.order] if plan.parts else plan.order
        """Entry of each position. One that this rank does not stage is at none."""
        self._cuts: list[_Cut] | None = None
        """By position; empty where no part is less than its local tensor."""
        self.canary_nbytes = canary_nbytes
        self._destinations: list[torch.Tensor | None] = [None] * len(plan.order)
        self._has_exotic = False
        self._combs: dict[int, tuple[Points, torch.Tensor]] = {}
        self.file_of = [plan.entry_files[part] for part in plan.order]
        """File of each position; never falls."""
        self.starts = [plan.offsets[part] - plan.files[plan.entry_files[part]].offset for part in plan.order]
        """Offset in its file of each position."""
        self.sizes = [plan.sizes[part] for part in plan.order]
        """Bytes of each position."""
        self._missing = sum(1 for nbytes in self.sizes if nbytes)
        self.empty = bytes(not nbytes for nbytes in self.sizes)
        """1 for each position without bytes."""
        self.spans: list[tuple[int, int]] = [(0, 0)] * len(plan.files)
        """First position of each file, and the one behind its last."""
        for position, file in enumerate(self.file_of):
            first, stop = self.spans[file]
            self.spans[file] = (first if stop else position, position + 1)

    def entry_of(self, part: int) -> int:
        """Return the entry that a part is of."""
        return self.plan.parts[part].entry if self.plan.parts else part

    def blocks(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return what is staged at each position, as views of the live tensors; others are not touched."""
        found = [tensors[entry] for entry in self.entries]
        if not self.plan.parts:
            return found
        if self._cuts is None:
            cuts = [_cut(self.plan.parts[part], tensor) for part, tensor in zip(self.order, found, strict=True)]
            self._cuts = cuts if any(cuts) else []
        for position, cut in enumerate(self._cuts):
            for dim, first, length in cut:
                found[position] = found[position].narrow(dim, first, length)
        return found

    def destinations(self, positions: Sequence[int], sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return ``destination`` of many."""
        if self._missing:
            return [self.destination(*pair) for pair in zip(positions, sources, strict=True)]
        made = cast("list[torch.Tensor]", self._destinations)  # none is missing
        return [made[position] for position in positions]

    def sources(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors with ``plain`` dtypes; once their destinations are made."""
        if not self._has_exotic:
            return tensors
        return [plain(tensor) for tensor in tensors]

    def destination(self, position: int, source: torch.Tensor) -> torch.Tensor:
        """Return the arena's tensor for this position, of the ``plain`` dtype and the shape of ``source``."""
        found = self._destinations[position]
        if found is None:
            like = plain(source)
            found = self.arena.typed(self.plan.offsets[self.order[position]], like.dtype, like.shape)
            self._destinations[position] = found
            self._missing -= 1 if self.sizes[position] else 0
            self._has_exotic = self._has_exotic or like is not source
        return found

    def comb(self, position: int, source: torch.Tensor) -> Points:
        """Return which elements of ``source``, contiguous, are its canaries."""
        found = self._combs.get(position)
        if found is None:
            destination = self.destination(position, source)
            chosen = points(destination.numel(), destination.element_size(), self.canary_nbytes)
            found = self._combs[position] = (chosen, destination.as_strided(*chosen))
        return found[0]

    def staged_canaries(self, position: int) -> torch.Tensor:
        """Return the staged side of ``comb``, as a view."""
        return self._combs[position][1]


def _cut(part: Part, tensor: torch.Tensor) -> _Cut:
    """Return how a part is made of the local tensor that it is of."""
    shape = list(tensor.shape)
    if tensor.dtype is torch.float4_e2m1fn_x2:  # of bytes here, of elements there; no part begins within it
        shape[-1] *= 2
    boxes = enumerate(zip(shape, part.local_offsets, part.shape, strict=True))
    return tuple((dim, first, length) for dim, (size, first, length) in boxes if length < size)
