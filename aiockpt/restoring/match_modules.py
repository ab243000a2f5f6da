"""A live module beside its part of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from aiockpt.format.names import Segments, dotted
from aiockpt.format.tree import Node
from aiockpt.restoring.plan import LoadModule, Plan
from aiockpt.restoring.selection import Selection
from aiockpt.restoring.targets import ModuleTarget
from aiockpt.state.modules import ModuleItems, has_load_hooks
from aiockpt.state.sharded import is_sharded

__all__ = ["match_module"]


def match_module(plan: Plan, selection: Selection, target: ModuleTarget, node: Node, *, strict: bool) -> None:
    """Plan the restore of a module.

    Parameters and buffers are overwritten in place. A module that needs ``load_state_dict`` (own loading, hooks, extra
    state) gets that call afterwards: with these live tensors, so that nothing is copied twice, and with fresh ones
    where a submodule's own code may look at or change them. Names below such a submodule are for its code to judge,
    as hooks that rename the keys of older versions need it; what it then refuses is an error of applying.
    """
    view = plan.view
    stored = view.mapping(node)
    if stored is None:
        if selection.takes_whole(dotted(target.path)):
            plan.refuse(target.path, f"{view.what(node)} in the checkpoint, a module in the state")
        return
    children = {child.segment: child.node for child in stored}
    metadata = node[2] if isinstance(node, list) and node[0] == "module" else None
    matcher = _ModuleMatcher(plan, selection, target.path, target.read)
    for name, item in target.read.items.items():
        matcher.live_item(name, item, children)
    for name, child in children.items():
        if name not in target.read.items:
            matcher.stored_item(name, child)
    matcher.note_missing()
    if target.read.needs_load_state_dict and matcher.any_taken:
        fresh_metadata = plan.fresh_part(metadata) if isinstance(metadata, int) and metadata < 0 else None
        plan.steps.append(LoadModule(target.path, target.read, matcher.items, fresh_metadata, strict))


class _ModuleMatcher:
    def __init__(self, plan: Plan, selection: Selection, path: Segments, read: ModuleItems) -> None:
        self._plan = plan
        self._selection = selection
        self._path = path
        self._needs_load = read.needs_load_state_dict
        self._judged_by_module = _judged_by_module(read)
        self._live = _live_tensors(read) if self._needs_load else frozenset()
        self._absent: list[tuple[str, Any]] = []
        self.items: dict[str, Any] = {}
        """For ``load_state_dict``, complete: what is not taken stands there as it is."""
        self.any_taken = False

    def live_item(self, name: str, item: Any, children: dict[str, Node]) -> None:
        """Plan one live item."""
        path = (*self._path, name)
        if not self._selection.takes(dotted(path)):
            self.items[name] = item
            return
        if name not in children:
            if not self._judged_by_module(name):
                self._absent.append((dotted(path), item))
                self.items[name] = item
            return
        node = children[name]
        if self._is_fresh(name, item):
            self._take_fresh(name, node, like=item)
            return
        if not isinstance(node, int) or node < 0:
            self._plan.refuse(path, f"{self._plan.view.what(node)} in the checkpoint, a tensor in the state")
        elif (why := self._plan.misfit(node, item)) is not None:
            self._plan.refuse(path, why)
        else:
            self._plan.read_in_place(path, node, item)
            self.any_taken = True
        self.items[name] = item

    def stored_item(self, name: str, node: Node) -> None:
        """Plan one item of the checkpoint that the live module does not have."""
        path = (*self._path, name)
        if not self._selection.takes_whole(dotted(path)):
            return
        if self._judged_by_module(name):
            self._take_fresh(name, node)
        else:
            self._plan.unexpected += self._plan.view.names_below(node, path)

    def note_missing(self) -> None:
        """Note the live items that the checkpoint does not have and that get nothing.

        A tied weight stands under one of its names in the files of others: all of its names get what that one gets.
        """
        self._plan.missing += [
            name for name, item in self._absent if not (isinstance(item, torch.Tensor) and self._plan.overwrites(item))
        ]

    def _is_fresh(self, name: str, item: Any) -> bool:
        return self._needs_load and (id(item) not in self._live or self._judged_by_module(name))

    def _take_fresh(self, name: str, node: Node, *, like: Any = None) -> None:
        # What loads a DTensor takes nothing else; to all other code plain tensors on the CPU are given.
        if isinstance(like, torch.Tensor) and is_sharded(like):
            self.items[name] = self._plan.fresh_part(node, device=like.device, like=like)
        else:
            self.items[name] = self._plan.fresh_part(node)
        self.any_taken = True


def _judged_by_module(read: ModuleItems) -> Callable[[str], bool]:
    """Return what tells whether a name is looked at by code that is not torch's own loading."""
    if not read.needs_load_state_dict:
        return lambda name: False
    if type(read.module).load_state_dict is not nn.Module.load_state_dict:
        return lambda name: True
    prefixes = tuple(place.name for place in read.places if _loads_itself(place.module))
    return lambda name: name.startswith(prefixes)


def _loads_itself(module: nn.Module) -> bool:
    own_code = not type(module)._load_from_state_dict.__module__.startswith("torch.nn.")
    return own_code or has_load_hooks(module)


def _live_tensors(read: ModuleItems) -> frozenset[int]:
    """Return the ids of the items that are parameters or buffers as they are, not something made for the moment."""
    owned: set[int] = set()
    for place in read.places:
        owned.update(map(id, place.module._parameters.values()))
        owned.update(map(id, place.module._buffers.values()))
    return frozenset(id(item) for item in read.items.values() if isinstance(item, torch.Tensor) and id(item) in owned)
