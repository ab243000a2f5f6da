"""What of a save depends on nothing but its plan and the arena, made once for both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from aiockpt.planning.local import LocalPlan
from aiockpt.staging.arena import ArenaView
from aiockpt.staging.canaries import Points, points

__all__ = ["Layout", "plain"]

_BYTES_AS_THEY_ARE = frozenset({torch.uint8, torch.int8, torch.bool})


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a one-byte exotic (fp8, fp4) as uint8: not every torch has kernels that copy or join those."""
    if tensor.element_size() == 1 and tensor.dtype not in _BYTES_AS_THEY_ARE:
        return tensor.view(torch.uint8)
    return tensor


class Layout:
    """Places of a plan's entries in one arena, in file order.

    A *position* is an index into ``plan.order``, an *entry* one into the plan's (and the collected) tensors. Equal
    plans have equal dtypes and shapes, so what is made from the first save's tensors serves all later ones.
    """

    def __init__(self, plan: LocalPlan, arena: ArenaView, *, canary_nbytes: int) -> None:
        self.plan = plan
        self.arena = arena
        self.order = plan.order
        self.canary_nbytes = canary_nbytes
        self._destinations: list[torch.Tensor | None] = [None] * len(plan.order)
        self._has_exotic = False
        self._combs: dict[int, tuple[Points, torch.Tensor]] = {}
        self.file_of = [plan.entry_files[entry] for entry in plan.order]
        """File of each position; never falls."""
        self.starts = [plan.offsets[entry] - plan.files[plan.entry_files[entry]].offset for entry in plan.order]
        """Offset in its file of each position."""
        self.sizes = [plan.sizes[entry] for entry in plan.order]
        """Bytes of each position."""
        self._missing = sum(1 for nbytes in self.sizes if nbytes)
        self.empty = bytes(not nbytes for nbytes in self.sizes)
        """1 for each position without bytes."""
        self.spans: list[tuple[int, int]] = [(0, 0)] * len(plan.files)
        """First position of each file, and the one behind its last."""
        for position, file in enumerate(self.file_of):
            first, stop = self.spans[file]
            self.spans[file] = (first if stop else position, position + 1)

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
