"""A live optimizer beside its part of a checkpoint, parameter by parameter name."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from aiockpt.format.names import Segments, dotted
from aiockpt.format.tree import Node
from aiockpt.restoring.plan import Fresh, LoadObject, LoadOptimizer, Plan, SetState
from aiockpt.restoring.selection import Selection
from aiockpt.restoring.targets import OptimizerTarget
from aiockpt.state.optimizers import OptimizerItems, state_device

__all__ = ["match_optimizer"]

_OF_THE_LIVE_GROUP = frozenset({"params", "param_names"})
"""Keys of a group that say which parameters it has, in the live order."""
_DEVICE_FLAGS = frozenset({"capturable", "fused"})


class _Plain(NamedTuple):
    """A hyperparameter without tensors."""

    value: Any


class _StoredGroup(NamedTuple):
    names: list[str]
    options: dict[str, Node | _Plain]
    """Nodes where tensors are in them."""


def match_optimizer(plan: Plan, selection: Selection, target: OptimizerTarget, node: Node) -> None:
    """Plan the restore of an optimizer.

    State and hyperparameters go by the parameter's name, so another order or grouping of the same parameters loads.
    Live state tensors of the same shape and dtype are overwritten in place; others are replaced, with the dtype of the
    checkpoint (fp32 state of bf16 parameters stays fp32). State that the checkpoint has not is removed.

    An optimizer with its own ``state_dict`` or ``load_state_dict``, or hooks on them, is loaded by it.
    """
    path, read, view = target.path, target.read, plan.view
    if read.uses_state_dict:
        if selection.takes_whole(dotted(path)):
            plan.steps.append(LoadObject(path, read.optimizer, plan.fresh_part(node)))
        return
    if not (isinstance(node, dict) and isinstance(node.get("state"), dict) and "param_groups" in node):
        if selection.takes_whole(dotted(path)):
            plan.refuse(path, f"{view.what(node)} in the checkpoint that is no optimizer by parameter names")
        return
    step = LoadOptimizer(path, read.optimizer)
    matcher = _OptimizerMatcher(plan, selection, path, read, step)
    groups = matcher.stored_groups(node["param_groups"])
    known = {name for group in groups for name in group.names}
    matcher.groups(groups, known)
    matcher.states(node["state"], known)
    matcher.shared(node.get("shared"))
    plan.steps.append(step)


class _OptimizerMatcher:
    def __init__(
        self, plan: Plan, selection: Selection, path: Segments, read: OptimizerItems, step: LoadOptimizer
    ) -> None:
        self._plan = plan
        self._view = plan.view
        self._selection = selection
        self._path = path
        self._read = read
        self._step = step
        self._coming: dict[str, dict[str, Any]] = {}
        """By parameter: the flags of its group that decide where state lives, as they will be."""

    # ---- groups

    def stored_groups(self, node: Node) -> list[_StoredGroup]:
        """Return the groups of the checkpoint."""
        listed = self._view.sequence(node, "list")
        if listed is not None:
            items = [child.node for child in listed]
        else:
            items = [_Plain(group) for group in self._list(self._view.plain(node))]
        groups = []
        for item in items:
            options = self._options(item)
            params = options.pop("params", None)
            names = self._list(params.value if isinstance(params, _Plain) else self._view.plain(params))
            groups.append(_StoredGroup([str(name) for name in names], options))
        return groups

    def _options(self, item: Node | _Plain) -> dict[str, Any]:
        if not isinstance(item, (dict, _Plain)):
            item = _Plain(self._view.plain(item))
        if isinstance(item, dict):
            return {key: node if _has_tensors(node) else _Plain(self._view.plain(node)) for key, node in item.items()}
        if isinstance(item.value, dict):
            return {key: _Plain(value) for key, value in item.value.items()}
        raise self._view.corrupt(f"{dotted(self._path)!r} has a parameter group that is no dict")

    def _list(self, value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise self._view.corrupt(f"{dotted(self._path)!r} has a list of parameters or groups that is none")
        return value

    def groups(self, stored: list[_StoredGroup], known: set[str]) -> None:
        """Plan the hyperparameters of every live group, and compare the names."""
        states = (*self._path, "state")
        taken = self._selection.takes
        here = {name: dotted((*states, name)) for name in {*self._read.params, *known}}
        self._plan.missing += [here[name] for name in self._read.params if name not in known and taken(here[name])]
        absent = sorted(known - self._read.params.keys())
        self._plan.unexpected += [here[name] for name in absent if taken(here[name])]
        path = (*self._path, "param_groups")
        if self._selection.takes_whole(dotted(path)):
            self._refuse_other_order(stored)
            group_of = {name: index for index, group in enumerate(stored) for name in group.names}
            for index, names in enumerate(self._read.param_names):
                sources = sorted({group_of[name] for name in names if name in group_of})
                if not sources and not names and index < len(stored) and not stored[index].names:
                    sources = [index]  # empty on both sides
                if sources:
                    self._group((*path, str(index)), index, [stored[source].options for source in sources], sources)

    def _group(self, path: Segments, index: int, options: list[dict[str, Node | _Plain]], sources: list[int]) -> None:
        differing = _differing(options)
        if differing:
            self._plan.refuse(
                path,
                f"its parameters come from groups {', '.join(map(str, sources))} of the checkpoint, which differ in"
                f" {', '.join(differing)}",
            )
            return
        flags = {key: option.value for key, option in options[0].items() if isinstance(option, _Plain)}
        coming = {key: flags[key] for key in _DEVICE_FLAGS & flags.keys()}
        for name in self._read.param_names[index]:
            self._coming[name] = coming
        for key, option in options[0].items():
            if key not in _OF_THE_LIVE_GROUP:
                self._option((*path, key), self._read.optimizer.param_groups[index], key, option)

    def _refuse_other_order(self, stored: list[_StoredGroup]) -> None:
        if not isinstance(self._read.optimizer, torch.optim.LBFGS):
            return
        if [group.names for group in stored] != self._read.param_names:
            self._plan.refuse(
                self._path, "LBFGS keeps one flat state, its parameters must be those saved, in that order"
            )

    def _option(self, path: Segments, group: dict[str, Any], key: str, option: Node | _Plain) -> None:
        live = group.get(key)
        if isinstance(option, _Plain):
            value = Fresh(None, {}, copy.deepcopy(option.value))  # two live groups may get it
        elif isinstance(live, torch.Tensor) and isinstance(option, int) and self._plan.misfit(option, live) is None:
            self._plan.read_in_place(path, option, live)
            return
        else:
            value = self._plan.fresh_part(option, device=_device_in(live))
        self._step.assigned.append(SetState(path, group, key, value))

    # ---- state

    def states(self, stored: Mapping[str, Node], known: set[str]) -> None:
        """Plan the state of every live parameter."""
        for name, param in self._read.params.items():
            if name not in known:
                continue
            path = (*self._path, "state", name)
            if name not in stored:
                if name in self._read.state and self._selection.takes(dotted(path)):
                    self._step.removed.append((None, param))
                continue
            self._state(path, param, stored[name])

    def _state(self, path: Segments, param: torch.Tensor, node: Node) -> None:
        name = path[-1]
        live = self._read.state.get(name)
        children = self._view.mapping(node)
        if children is None or (live is not None and not isinstance(live, dict)):
            if self._selection.takes(dotted(path)):
                state: Any = self._read.optimizer.state
                part = self._plan.fresh_part(node, device=param.device)
                self._step.assigned.append(SetState(path, state, param, part))
            return
        holder = live
        taken = set()
        for child in children:
            here = (*path, child.segment)
            taken.add(key := self._view.key(child))
            if not self._selection.takes(dotted(here)):
                continue
            if holder is None:
                holder = {}
                self._step.created.append((param, holder))
            self._state_item(here, param, holder, key, child.node)
        for key in live or ():
            if key not in taken and self._selection.takes(dotted((*path, str(key)))):
                self._step.removed.append((live, key))

    def _state_item(self, path: Segments, param: torch.Tensor, holder: dict[Any, Any], key: Any, node: Node) -> None:
        name, live = path[-2], holder.get(key)
        device = self._device(name, param, key, live)
        if not isinstance(node, int) or node < 0:
            self._step.assigned.append(SetState(path, holder, key, self._plan.fresh_part(node, device=device)))
        elif isinstance(live, torch.Tensor) and live.device == device and self._plan.misfit(node, live) is None:
            self._plan.read_in_place(path, node, live)
        elif (why := self._other_shape(node, param, live, name)) is not None:
            self._plan.refuse(path, why)
        else:
            # "step" of a parameter without dimensions is no DTensor, even if the parameter is one.
            fresh = self._plan.read_fresh(node, device=device, like=param if key != "step" else None)
            self._step.assigned.append(SetState(path, holder, key, fresh))

    def _device(self, name: str, param: torch.Tensor, key: Any, live: Any) -> torch.device:
        """Return where a piece of state belongs: where it is, unless its group is about to want it elsewhere."""
        group = {**self._read.groups[self._read.group_of[name]], **self._coming.get(name, {})}
        device = state_device(param, group, key if isinstance(key, str) else "")
        stays = isinstance(live, torch.Tensor) and (key != "step" or device.type == "cpu")
        return live.device if stays else device

    def _other_shape(self, entry: int, param: torch.Tensor, live: Any, name: str) -> str | None:
        """Return why state does not belong to a parameter of the live shape; None where it may."""
        _, shape = self._view.form(entry)
        if shape == tuple(param.shape):
            return None
        if isinstance(live, torch.Tensor) and live.shape == param.shape:
            return f"shape {list(shape)} in the checkpoint, {list(live.shape)} in the state"
        saved = self._view.shape_of(name)
        if saved == shape and shape:
            return f"shape {list(shape)} in the checkpoint, its parameter has {list(param.shape)} in the state"
        return None

    def shared(self, node: Node | None) -> None:
        """Plan the state that is kept under keys that are no parameters."""
        live = dict(self._read.shared)
        for child in (self._view.mapping(node) if node is not None else None) or ():
            key = self._view.key(child)
            old = live.pop(key, None)
            path = (*self._path, "shared", child.segment)
            if self._selection.takes_whole(dotted(path)):
                part = self._plan.fresh_part(child.node, device=_device_in(old))
                holder: Any = self._read.optimizer.state
                self._step.assigned.append(SetState(path, holder, key, part))
        for key in live:
            if self._selection.takes_whole(dotted((*self._path, "shared", str(key)))):
                self._step.removed.append((None, key))


def _device_in(live: Any) -> torch.device | str:
    """Return the device of the first tensor in a live hyperparameter; the CPU where it has none."""
    if isinstance(live, torch.Tensor):
        return live.device
    if isinstance(live, (list, tuple)):
        return next((item.device for item in live if isinstance(item, torch.Tensor)), "cpu")
    return "cpu"


def _has_tensors(node: Node) -> bool:
    return not isinstance(node, int) or node >= 0


def _differing(groups: list[dict[str, Node | _Plain]]) -> list[str]:
    """Return the hyperparameters in which groups differ."""
    keys = {key for options in groups for key in options} - _OF_THE_LIVE_GROUP
    # By repr, so that NaN equals NaN; what has tensors is a node with entry numbers here.
    return sorted(key for key in keys if len({repr(options.get(key)) for options in groups}) > 1)
