"""A state as it was collected: what a save needs of it, by number and by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from aiockpt.format.names import Segments
from aiockpt.format.tree import Node
from aiockpt.planning.local import Entry
from aiockpt.planning.placings import Placing
from aiockpt.state.modules import ModuleItems
from aiockpt.state.optimizers import OptimizerItems
from aiockpt.state.placing import Placer, placer_for
from aiockpt.state.ranks import ALONE

__all__ = ["Collected", "Found"]


class Found(NamedTuple):
    """An object of the state and what was read of it."""

    path: Segments
    object: Any
    read: ModuleItems | OptimizerItems | None
    """None for an object that is known by its ``state_dict`` alone."""


@dataclass(slots=True)
class Collected:
    """A state as a save needs it. Everything is live; nothing was copied but what ``tensors`` says."""

    entries: list[Entry] = field(default_factory=list)
    """Tied tensors of one top-level folder are one entry, under the first of their names in sorted order."""
    tensors: list[torch.Tensor] = field(default_factory=list)
    """Per entry the live memory: plain, strided, detached, of the entry's dtype and of the shape that its placing
    leaves to this rank (but float4, whose last dimension torch counts in bytes); may be non-contiguous. A copy only of
    lazily conjugated or negated tensors, of bytes, and of numpy arrays that torch cannot alias."""
    tree: Node = None
    """See ``format.tree``; numbers are positions in ``entries`` and ``values``."""
    values: list[tuple[Segments, object]] = field(default_factory=list)
    """By number: where it stands, and the live value; ``encode_values`` takes them."""
    plain_files: dict[str, bytes] = field(default_factory=dict)
    slow: dict[str, float] = field(default_factory=dict)
    """Seconds that the ``state_dict()`` of an object took, by dotted key, where they are worth a word."""
    copies: dict[int, object] = field(default_factory=dict)
    """By entry number: the live object where ``tensors`` has a copy of it."""
    objects: list[Found] = field(default_factory=list)
    """Modules and other objects in the order in which they were met, then optimizers in theirs."""
    placer: Placer = field(default_factory=lambda: placer_for(ALONE, ()))
    """What gave the entries their placings."""
    replicas: dict[int, Placing] = field(default_factory=dict)
    """By ``id`` of a parameter that is declared to be the same on several ranks; its optimizer's state is so too."""

    def cuda_device(self) -> torch.device | None:
        """Return a CUDA device that holds a tensor of the state, None where none does."""
        return next((tensor.device for tensor in self.tensors if tensor.is_cuda), None)
