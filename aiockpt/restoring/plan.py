"""What a restore is going to do: reads into memory, then steps for the caller's thread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.names import Segments, dotted
from aiockpt.format.tree import Node
from aiockpt.restoring.checkpoint_view import CheckpointView
from aiockpt.restoring.destinations import unfit_memory
from aiockpt.restoring.regions import local_memory, region_of
from aiockpt.restoring.targets import Slot
from aiockpt.state.modules import ModuleItems
from aiockpt.state.sharded import is_sharded

__all__ = ["Fresh", "LoadModule", "LoadObject", "LoadOptimizer", "Plan", "SetState", "SetValue", "Step"]


@dataclass(slots=True)
class Fresh:
    """A part of the checkpoint that becomes new Python objects, once its tensors are read."""

    node: Node
    tensors: dict[int, torch.Tensor]
    """By entry number; tied tensors share memory."""
    value: Any = None
    """The objects; there after ``Plan.build``."""


@dataclass(slots=True)
class SetValue:
    """Put a value into a container of the user's."""

    path: Segments
    slot: Slot
    value: Fresh


@dataclass(slots=True)
class LoadModule:
    """Call ``load_state_dict``; items that were read in place stand in it as they are, which copies nothing."""

    path: Segments
    read: ModuleItems
    items: dict[str, Fresh | Any]
    metadata: Fresh | None
    strict: bool


@dataclass(slots=True)
class SetState:
    """One assignment in an optimizer: to its state, shared state, or a parameter group."""

    path: Segments
    holder: dict[Any, Any]
    key: Any
    value: Fresh | torch.Tensor


@dataclass(slots=True)
class LoadOptimizer:
    """Give an optimizer its state and hyperparameters; what is in place already needs no step here."""

    path: Segments
    optimizer: Optimizer
    created: list[tuple[Any, dict[Any, Any]]] = field(default_factory=list)
    """Owners (parameters, or other keys) whose state begins to exist, with the dict that will hold it."""
    removed: list[tuple[dict[Any, Any] | None, Any]] = field(default_factory=list)
    """(dict of state, key) that go away; None stands for the optimizer's ``state`` itself."""
    assigned: list[SetState] = field(default_factory=list)


@dataclass(slots=True)
class LoadObject:
    """Call an object's ``load_state_dict`` with fresh values."""

    path: Segments
    object: Any
    value: Fresh


Step = SetValue | LoadModule | LoadOptimizer | LoadObject


class Plan:
    """Filled by matching; nothing live is changed by making it."""

    def __init__(self, view: CheckpointView) -> None:
        self.view = view
        self.steps: list[Step] = []
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.mismatched: list[tuple[str, str]] = []
        """(name, what does not fit)."""
        self._parts: list[Fresh] = []
        self._live: dict[Any, tuple[int, torch.Tensor]] = {}
        self.live_names: dict[Any, str] = {}
        """By a key for its memory: the dotted name of each live tensor that is overwritten."""
        self._fresh: list[tuple[int, torch.Tensor]] = []

    @property
    def live(self) -> list[tuple[int, torch.Tensor]]:
        """(entry, tensor) to be overwritten in place; each memory once."""
        return list(self._live.values())

    @property
    def fresh(self) -> list[tuple[int, torch.Tensor]]:
        """(entry, tensor) to be filled, which nobody else sees yet."""
        return self._fresh

    def refuse(self, path: Segments, why: str) -> None:
        """Note that the checkpoint's and the live part of this name do not fit."""
        self.mismatched.append((dotted(path), why))

    def misfit(self, entry: int, tensor: torch.Tensor) -> str | None:
        """Return why an entry cannot be read into a live tensor, or None where it can."""
        dtype, shape = self.view.form(entry)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            return f"{described(dtype, shape)} in the checkpoint, {described(tensor.dtype, tensor.shape)} in the state"
        return _unfit(tensor)

    def read_in_place(self, path: Segments, entry: int, tensor: torch.Tensor) -> None:
        """Have a live tensor overwritten; it fits. Of two entries for the same memory the later one counts."""
        if tensor.numel():
            key = _memory_key(tensor)  # a DTensor whose local part is empty here has one too
            self._live.pop(key, None)
            self._live[key] = entry, tensor
            self.live_names[key] = dotted(path)

    def overwrites(self, tensor: torch.Tensor) -> bool:
        """Tell whether a live tensor's memory is overwritten in place, under whatever name."""
        return _unfit(tensor) is None and tensor.numel() > 0 and _memory_key(tensor) in self._live

    def leaves(self, changed: Mapping[Any, str]) -> list[str]:
        """Return which of the live tensors that another plan overwrote this one would leave as they are.

        Args:
            changed: ``live_names`` of that plan.
        """
        replaced = {_memory_key(tensor) for step in self.steps for tensor in _dropped(step) if tensor.numel()}
        return [name for key, name in changed.items() if key not in self._live and key not in replaced]

    def read_fresh(
        self, entry: int, *, device: torch.device | str = "cpu", like: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Have a new tensor filled.

        Args:
            entry: Its number.
            device: Where the tensor is made.
            like: A tensor whose strides it gets, and whose mesh and placements, if the shapes agree.
        """
        dtype, shape = self.view.form(entry)
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be trained on
            if like is not None and tuple(like.shape) == shape:
                tensor = torch.empty_like(like.detach(), dtype=dtype, device=device)
            else:
                tensor = torch.empty(shape, dtype=dtype, device=device)
        self._fresh.append((entry, tensor))
        return tensor

    def fresh_part(self, node: Node, *, device: torch.device | str = "cpu", like: torch.Tensor | None = None) -> Fresh:
        """Have everything below ``node`` read into new objects; arguments as of ``read_fresh``."""
        tensors: dict[int, torch.Tensor] = {}
        for entry, is_blob in self.view.entries_below(node):
            if entry not in tensors:
                tensors[entry] = self.read_fresh(entry, device="cpu" if is_blob else device, like=like)
        self.view.need_values(node)
        part = Fresh(node, tensors)
        self._parts.append(part)
        return part

    def build(self) -> None:
        """Make the objects of all fresh parts; their tensors were read.

        Raises:
            CheckpointCorruptError: A part is nothing that a save makes.
        """
        for part in self._parts:
            part.value = self.view.build(part.node, part.tensors)


def _unfit(tensor: torch.Tensor) -> str | None:
    """Return why a live tensor, or what of it is on this rank, cannot be overwritten; None where it can."""
    try:
        return unfit_memory(region_of(tensor).memory)
    except UnsupportedValueError as exc:
        return f"the live DTensor cannot be written to: {exc.why}"


def _memory_key(tensor: torch.Tensor) -> Any:
    if is_sharded(tensor) and not (tensor := local_memory(tensor)).numel():
        return "empty", id(tensor)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device, tensor.is_conj()


def _dropped(step: Step) -> Iterator[torch.Tensor]:
    """Yield the tensors of an optimizer's state that give way to others, or to none."""
    if isinstance(step, LoadOptimizer):
        state: Any = step.optimizer.state
        gone = [(state if holder is None else holder).get(key) for holder, key in step.removed]
        gone += [assignment.holder.get(assignment.key) for assignment in step.assigned]
        for item in gone:
            inner = item.values() if isinstance(item, dict) else (item,)
            yield from (tensor for tensor in inner if isinstance(tensor, torch.Tensor))


def described(dtype: torch.dtype, shape: Sequence[int]) -> str:
    """Return dtype and shape as people write them."""
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
