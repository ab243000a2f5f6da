"""Optimizers as state by parameter name."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.names import Segments, dotted

__all__ = [
    "OptimizerItems",
    "read_optimizer",
    "refuse_sharded",
    "state_device",
    "uses_state_dict",
]

_MOST_NAMED = 10
"""Parameters listed in an error message."""
_STATE_DICT_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


@dataclass(slots=True)
class OptimizerItems:
    """An optimizer by the names of its parameters. Tensors are the live memory; nothing is copied."""

    optimizer: Optimizer
    uses_state_dict: bool
    """It overrides ``state_dict`` or ``load_state_dict``, or has hooks on them: it is saved as the tree of its
    ``state_dict()`` and restored through ``load_state_dict``; all fields below are empty."""
    param_names: list[list[str]] = field(default_factory=list)
    """Per group, in the optimizer's order."""
    state: dict[str, Any] = field(default_factory=dict)
    """By parameter name: the optimizer's state of it, the live dict. Parameters without state are absent."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """The parameter groups with ``params`` replaced by names; other values as they are."""
    shared: dict[Any, Any] = field(default_factory=dict)
    """State that some optimizers keep under keys that are no parameters; the live values."""
    params: dict[str, torch.Tensor] = field(default_factory=dict)
    """By name: the live parameter, the key of ``optimizer.state``."""
    group_of: dict[str, int] = field(default_factory=dict)
    """By name: index of its group."""


def uses_state_dict(optimizer: Optimizer) -> bool:
    """Tell whether the optimizer's ``state_dict`` or ``load_state_dict`` do something of their own."""
    kind = type(optimizer)
    if kind.state_dict is not Optimizer.state_dict or kind.load_state_dict is not Optimizer.load_state_dict:
        return True
    attributes = optimizer.__dict__
    if "state_dict" in attributes or "load_state_dict" in attributes:
        return True
    return any(attributes.get(hooks) for hooks in _STATE_DICT_HOOKS)


def read_optimizer(optimizer: Optimizer, names: Mapping[int, str], path: Segments = ()) -> OptimizerItems:
    """Read an optimizer through ``.state`` and ``.param_groups``; no step, no gradient, no ``state_dict()`` call.

    Args:
        optimizer: As it is in the state.
        names: By ``id`` of the parameter, of all modules in the state; see ``parameter_names``. Where it has none of
            the optimizer's parameters they are named by group and index, ``0.3``.
        path: Where the optimizer stands in the state, for errors.

    Raises:
        UnsupportedValueError: Some parameters have names and others do not, there is state of a tensor that is in no
            group, or the optimizer is sharded over ranks.
    """
    refuse_sharded(optimizer, path)
    if uses_state_dict(optimizer):
        return OptimizerItems(optimizer, uses_state_dict=True)
    by_id = _names_of(optimizer, names, path)
    read = OptimizerItems(optimizer, uses_state_dict=False)
    for index, group in enumerate(optimizer.param_groups):
        group_names = [by_id[id(param)] for param in group["params"]]
        read.param_names.append(group_names)
        read.groups.append({key: value if key != "params" else group_names for key, value in group.items()})
        for name, param in zip(group_names, group["params"], strict=True):
            read.params[name] = param
            read.group_of[name] = index
    for owner, state in optimizer.state.items():
        if not isinstance(owner, torch.Tensor):
            read.shared[owner] = state
        elif id(owner) not in by_id:
            raise _stray(path)
        elif not (isinstance(state, dict) and not state):  # a look at the defaultdict leaves an empty one behind
            read.state[by_id[id(owner)]] = state
    return read


def state_device(param: torch.Tensor, group: Mapping[str, Any], key: str) -> torch.device:
    """Return where state ``key`` of ``param`` lives when restore has to make it: torch's own rule.

    ``step`` is on the CPU unless the group is ``capturable`` or ``fused``; everything else is beside its parameter.
    """
    if key == "step" and not (group.get("capturable") or group.get("fused")):
        return torch.device("cpu")
    return param.device


def refuse_sharded(optimizer: Optimizer, path: Segments) -> None:
    """Refuse an optimizer whose state lies on several ranks.

    Raises:
        UnsupportedValueError: It is torch's ZeroRedundancyOptimizer.
    """
    home = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if home is not None and isinstance(optimizer, home.ZeroRedundancyOptimizer):
        raise UnsupportedValueError(
            f"{dotted(path)!r} cannot be saved: a ZeroRedundancyOptimizer",
            why="its state is spread over the ranks, and its state_dict() needs a collective first",
            next="save with a plain optimizer",
            key=dotted(path),
            type_name="ZeroRedundancyOptimizer",
        )


def _names_of(optimizer: Optimizer, names: Mapping[int, str], path: Segments) -> dict[int, str]:
    by_id: dict[int, str] = {}
    unnamed: list[str] = []
    for index, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            name = names.get(id(param))
            if name is not None:
                by_id[id(param)] = name
            else:
                unnamed.append(f"{index}.{position} (shape {list(param.shape)})")
    if not unnamed:
        return by_id
    if by_id:
        shown = ", ".join(unnamed[:_MOST_NAMED]) + (", …" if len(unnamed) > _MOST_NAMED else "")
        raise UnsupportedValueError(
            f"{dotted(path)!r} cannot be saved: {len(unnamed)} of its parameters belong to no module in the state",
            why=f"group.index of those without a name: {shown}; another, such as {min(by_id.values())!r}, has one",
            next="put the modules of all its parameters into the state",
            key=dotted(path),
            type_name=type(optimizer).__qualname__,
        )
    return {
        id(param): f"{index}.{position}"
        for index, group in enumerate(optimizer.param_groups)
        for position, param in enumerate(group["params"])
    }


def _stray(path: Segments) -> UnsupportedValueError:
    return UnsupportedValueError(
        f"{dotted(path)!r} cannot be saved: it has state of a tensor that is in none of its groups",
        why="a parameter was taken out of a group, or its group's list was replaced, and its state stayed",
        next="delete that entry of optimizer.state",
        key=dotted(path),
        type_name="Tensor",
    )
