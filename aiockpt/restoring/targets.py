"""The live state as something that can be written to: what stands where, by name."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import nn
from torch.optim import Optimizer

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.names import Segments, dotted
from aiockpt.format.tree import key_text
from aiockpt.format.values import MAX_DEPTH
from aiockpt.restoring.selection import Patterns, Selection
from aiockpt.state.modules import ModuleItems, read_module
from aiockpt.state.objects import is_object
from aiockpt.state.optimizers import OptimizerItems, read_optimizer
from aiockpt.state.parameters import parameter_names
from aiockpt.state.per_rank import PerRank
from aiockpt.state.values import encode_key

__all__ = [
    "Branch",
    "KeyToken",
    "ModuleTarget",
    "ObjectTarget",
    "OptimizerTarget",
    "Slot",
    "Target",
    "Targets",
    "TensorTarget",
    "ValueTarget",
    "key_token",
    "read_targets",
]

KeyToken = str | bytes
"""Tells the keys of a mapping apart: ``1`` and ``"1"`` have the same segment."""


@dataclass(slots=True)
class Slot:
    """A place in a container of the user's."""

    container: Any
    key: Any
    parent: Slot | None
    """Where the container stands; None for the state itself."""

    def current(self) -> Any:
        """Return what stands there now."""
        return self._holder()[self.key]

    def assign(self, value: Any) -> None:
        """Put ``value`` there; a tuple is replaced by another one in its own place."""
        holder = self._holder()
        if type(holder) is tuple and self.parent is not None:
            self.parent.assign((*holder[: self.key], value, *holder[self.key + 1 :]))
        else:
            holder[self.key] = value

    @property
    def fixed(self) -> str | None:
        """Return the name of the type that takes no assignment, or None where one will do."""
        if type(self.container) is tuple:
            return self.parent.fixed if self.parent is not None else "tuple"
        return None if hasattr(type(self.container), "__setitem__") else type(self.container).__qualname__

    def _holder(self) -> Any:
        return self.parent.current() if type(self.container) is tuple and self.parent is not None else self.container


class OwnSlot(Slot):
    """What a ``PerRank`` holds; as that cannot be changed, another one takes its place.

    Args:
        outer: Where the ``PerRank`` stands.
    """

    __slots__ = ("_outer",)

    def __init__(self, outer: Slot) -> None:
        super().__init__(outer.current(), "value", outer)
        self._outer = outer

    def current(self) -> Any:
        """Return what is held now."""
        return self._outer.current().value

    def assign(self, value: Any) -> None:
        """Hold ``value``."""
        self._outer.assign(PerRank(value))

    @property
    def fixed(self) -> str | None:
        """Return the name of the type that takes no assignment, or None where one will do."""
        return self._outer.fixed


@dataclass(slots=True)
class TensorTarget:
    """A tensor in the user's own containers, overwritten in place."""

    path: Segments
    tensor: torch.Tensor


@dataclass(slots=True)
class ValueTarget:
    """Anything else in the user's own containers: what stands there is replaced."""

    path: Segments
    slot: Slot


@dataclass(slots=True)
class ModuleTarget:
    """A module."""

    path: Segments
    read: ModuleItems


@dataclass(slots=True)
class OptimizerTarget:
    """An optimizer."""

    path: Segments
    read: OptimizerItems


@dataclass(slots=True)
class ObjectTarget:
    """An object that loads its own state."""

    path: Segments
    object: Any


@dataclass(slots=True)
class Branch:
    """A container of the user's with targets in it."""

    path: Segments
    kind: type
    children: list[tuple[KeyToken, Target]] = field(default_factory=list)


Target = TensorTarget | ValueTarget | ModuleTarget | OptimizerTarget | ObjectTarget | Branch


@dataclass(slots=True)
class Targets:
    """A live state and what of it a restore is about."""

    root: Branch
    selection: Selection

    def cuda_devices(self) -> set[torch.device]:
        """Return the CUDA devices that hold tensors of the state."""
        return {tensor.device for tensor in _tensors(self.root) if tensor.is_cuda}


def read_targets(state: Mapping[Any, Any], include: Patterns = None, exclude: Patterns = None) -> Targets:
    """Look at a live state; to be called in the thread that owns it.

    ``state_dict()`` of modules is called, nothing of other objects, and nothing is changed.

    Args:
        state: As it is given to ``save``.
        include: See ``Selection``.
        exclude: See ``Selection``.

    Raises:
        ConfigError: A pattern is none.
        UnsupportedValueError: The state is no mapping, or holds what no checkpoint can.
    """
    selection = Selection(include, exclude)
    if not isinstance(state, Mapping) or is_object(state):
        raise UnsupportedValueError(
            f"a state is a mapping, not {type(state).__qualname__}",
            why="what is restored goes by name",
            next='give a dict, as in restore({"model": model, "optimizer": optimizer})',
            key="",
            type_name=type(state).__qualname__,
        )
    return Targets(_Reader(state).mapping(state, (), None, 0), selection)


def key_token(encoded: Any) -> KeyToken:
    """Return the token of a key as it stands in a tree."""
    return encoded if isinstance(encoded, str) else msgspec.json.encode(encoded)


def _segment(key: object, encoded: Any) -> str:
    return key if type(key) is str else key_text(encoded)


class _Reader:
    def __init__(self, state: Mapping[Any, Any]) -> None:
        self._state = state
        self._names: dict[int, str] | None = None

    def mapping(self, item: Mapping[Any, Any], path: Segments, slot: Slot | None, depth: int) -> Branch:
        """Return the branch of a mapping of the user's, in which every key is a target."""
        branch = Branch(path, dict)
        for key, child in item.items():
            encoded = encode_key(key, path)
            here = (*path, _segment(key, encoded))
            place = Slot(item, key, slot)
            target = self._part(child, here, place, depth + 1, in_list=False)
            branch.children.append((key_token(encoded), target or ValueTarget(here, place)))
        return branch

    def _part(self, item: Any, path: Segments, slot: Slot, depth: int, *, in_list: bool) -> Target | None:
        """Return the target of ``item``, or None where it is a value."""
        kind = type(item)
        if isinstance(item, torch.Tensor):
            return TensorTarget(path, item)
        if depth > MAX_DEPTH:
            raise UnsupportedValueError(
                f"{dotted(path[:8])!r}… cannot be restored: it is nested deeper than {MAX_DEPTH}",
                why="a container that holds itself has no end",
                next="take the reference to the outer container out of the inner one",
                key=dotted(path[:8]),
                type_name=kind.__qualname__,
            )
        if kind in (dict, OrderedDict, defaultdict):
            if not in_list:
                return self.mapping(item, path, slot, depth)
            encoded = [(key, encode_key(key, path)) for key in item]
            keys = [(key_token(code), _segment(key, code), key) for key, code in encoded]
            return self._parts(item, keys, path, slot, depth)
        if kind in (list, tuple):
            return self._parts(item, [(str(i), str(i), i) for i in range(len(item))], path, slot, depth)
        if kind is PerRank:
            inner = OwnSlot(slot)
            return self._part(item.value, path, inner, depth + 1, in_list=in_list) or ValueTarget(path, inner)
        return self._object(item, path)

    def _parts(
        self, item: Any, keys: list[tuple[KeyToken, str, Any]], path: Segments, slot: Slot, depth: int
    ) -> Branch | None:
        branch = Branch(path, type(item) if type(item) in (list, tuple) else dict)
        found = False
        for token, segment, key in keys:
            place = Slot(item, key, slot)
            target = self._part(item[key], (*path, segment), place, depth + 1, in_list=True)
            found = found or target is not None
            branch.children.append((token, target or ValueTarget((*path, segment), place)))
        return branch if found else None

    def _object(self, item: Any, path: Segments) -> Target | None:
        if isinstance(item, nn.Module):
            return ModuleTarget(path, read_module(item, path))
        if isinstance(item, Optimizer):
            if self._names is None:
                self._names = parameter_names(self._state)
            return OptimizerTarget(path, read_optimizer(item, self._names, path))
        return ObjectTarget(path, item) if is_object(item) else None


def _tensors(target: Target) -> Iterator[torch.Tensor]:
    match target:
        case Branch():
            for _, child in target.children:
                yield from _tensors(child)
        case TensorTarget():
            yield target.tensor
        case ModuleTarget():
            yield from (item for item in target.read.items.values() if isinstance(item, torch.Tensor))
        case OptimizerTarget():
            yield from (param for group in target.read.optimizer.param_groups for param in group["params"])
        case _:
            return
