"""Optimizers as state by parameter name, and the rules by which that state goes back."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.names import Segments, dotted

__all__ = [
    "OptimizerItems",
    "load_groups",
    "load_optimizer",
    "match_groups",
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


def match_groups(live: Sequence[Sequence[str]], saved: Sequence[Sequence[str]]) -> list[int | None]:
    """Return for each live group the index of the saved group whose hyperparameters it takes.

    It is the one that holds the same parameters; groups may stand in another order, and parameters too. None where
    the parameters of one live group come from several saved ones, or from none.

    Args:
        live: Parameter names per live group.
        saved: Parameter names per saved group.
    """
    home = {name: index for index, names in enumerate(saved) for name in names}
    found: list[int | None] = []
    for index, names in enumerate(live):
        homes = {home[name] for name in names if name in home}
        if len(homes) == 1:
            found.append(homes.pop())
        else:
            empty = not names and index < len(saved) and not saved[index]
            found.append(index if empty else None)
    return found


def load_groups(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]], matched: Sequence[int | None]) -> None:
    """Give the live groups the hyperparameters of the saved ones; ``params`` stay, so do keys that were not saved.

    A live tensor, such as an ``lr`` that a captured graph reads, keeps its memory where the saved value fits into it.

    Args:
        optimizer: The live one.
        groups: As they were saved, with fresh values.
        matched: Per live group its index in ``groups``; None leaves the group alone.
    """
    for live, index in zip(optimizer.param_groups, matched, strict=True):
        if index is None:
            continue
        for key, value in groups[index].items():
            if key == "params":
                continue
            held = live.get(key)
            if isinstance(held, torch.Tensor) and _fits(held, value):
                with torch.no_grad():
                    held.copy_(value) if isinstance(value, torch.Tensor) else held.fill_(value)
            else:
                live[key] = value


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Call ``load_state_dict`` of an optimizer that has its own, and put back the dtypes that torch's part casts.

    Torch casts the state of a bf16 parameter to bf16, whatever it was.

    Args:
        optimizer: One that ``uses_state_dict``.
        state: What its ``state_dict()`` gave, with fresh tensors: the optimizer may keep them.
    """
    optimizer.load_state_dict(state)
    saved, groups = state.get("state"), state.get("param_groups")
    if not isinstance(saved, dict) or not isinstance(groups, list):
        return
    numbers = [number for group in groups for number in group.get("params", ())]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if len(numbers) != len(params):
        return
    for number, param in zip(numbers, params, strict=True):
        entry, live = saved.get(number), optimizer.state.get(param)
        if not isinstance(entry, dict) or not isinstance(live, dict):
            continue
        for key, value in entry.items():
            held = live.get(key)
            if isinstance(value, torch.Tensor) and isinstance(held, torch.Tensor) and held.dtype != value.dtype:
                live[key] = value.to(held.device)


def _fits(held: torch.Tensor, value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return held.shape == value.shape and held.dtype == value.dtype
    return type(value) in (int, float) and held.numel() == 1 and held.dtype.is_floating_point


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
