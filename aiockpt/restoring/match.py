"""Live targets beside a checkpoint's manifest: a plan of reads, or one error that lists all that does not fit."""

from __future__ import annotations

from collections.abc import Sequence

from aiockpt.errors import ConfigError, StateMismatchError
from aiockpt.format.names import Segments, dotted
from aiockpt.format.tree import Node
from aiockpt.restoring.checkpoint_view import CheckpointView
from aiockpt.restoring.match_modules import match_module
from aiockpt.restoring.match_optimizers import match_optimizer
from aiockpt.restoring.plan import LoadObject, Plan, SetValue
from aiockpt.restoring.selection import Selection
from aiockpt.restoring.targets import (
    Branch,
    ModuleTarget,
    ObjectTarget,
    OptimizerTarget,
    Target,
    Targets,
    TensorTarget,
    ValueTarget,
    key_token,
)

__all__ = ["match"]

_MOST_SHOWN = 20
"""Names of one kind in an error's text; its fields have all."""


def match(targets: Targets, view: CheckpointView, *, strict: bool) -> Plan:
    """Decide where everything goes; nothing live is changed.

    With ``strict=False`` what does not fit is left out: names of the state that get nothing are ``missing``, names of
    the checkpoint that nothing takes are ``unexpected``, and what has another shape or dtype is both.

    Raises:
        StateMismatchError: Lists everything; only with ``strict``.
        ConfigError: An include pattern fits neither a name of the state nor one of the checkpoint.
        CheckpointCorruptError: The manifest contradicts itself.
    """
    plan = Plan(view)
    _Matcher(plan, targets.selection, strict=strict).branch(targets.root, view.plan.tree)
    _refuse_idle_patterns(targets, view)
    if plan.mismatched and not strict:
        names = [name for name, _ in plan.mismatched]
        plan.missing += names
        plan.unexpected += names
    elif strict and (plan.missing or plan.unexpected or plan.mismatched):
        raise _mismatch(plan, view.manifest.head.step)
    return plan


class _Matcher:
    """Walks the live state and the checkpoint's tree side by side."""

    def __init__(self, plan: Plan, selection: Selection, *, strict: bool) -> None:
        self._plan = plan
        self._view = plan.view
        self._selection = selection
        self._strict = strict

    def branch(self, target: Branch, node: Node) -> None:
        """Match a container of the user's."""
        view = self._view
        stored = view.mapping(node) if target.kind is dict else view.sequence(node, target.kind.__name__)
        if stored is None:
            if self._selection.takes_whole(dotted(target.path)):
                self._plan.refuse(
                    target.path, f"{view.what(node)} in the checkpoint, a {target.kind.__name__} in the state"
                )
            return
        children = {key_token(child.key): child for child in stored}
        for token, target_below in target.children:
            found = children.pop(token, None)
            if found is None:
                self._absent(target_below)
            else:
                self._target(target_below, found.node)
        for child in children.values():
            self._unexpected(child.node, (*target.path, child.segment))

    def _target(self, target: Target, node: Node) -> None:
        match target:
            case Branch():
                self.branch(target, node)
            case TensorTarget():
                self._tensor(target, node)
            case ModuleTarget():
                match_module(self._plan, self._selection, target, node, strict=self._strict)
            case OptimizerTarget():
                match_optimizer(self._plan, self._selection, target, node)
            case ValueTarget() if self._selection.takes_whole(dotted(target.path)):
                self._value(target, node)
            case ObjectTarget() if self._selection.takes_whole(dotted(target.path)):
                self._plan.steps.append(LoadObject(target.path, target.object, self._plan.fresh_part(node)))

    def _tensor(self, target: TensorTarget, node: Node) -> None:
        if not self._selection.takes(dotted(target.path)):
            return
        if not isinstance(node, int) or node < 0:
            self._plan.refuse(target.path, f"{self._view.what(node)} in the checkpoint, a tensor in the state")
        elif (why := self._plan.misfit(node, target.tensor)) is not None:
            self._plan.refuse(target.path, why)
        else:
            self._plan.read_in_place(target.path, node, target.tensor)

    def _value(self, target: ValueTarget, node: Node) -> None:
        if isinstance(node, list) and node[0] == "module":
            live = type(target.slot.current()).__qualname__
            self._plan.refuse(target.path, f"a module in the checkpoint, {live} in the state")
        elif (fixed := target.slot.fixed) is not None:
            self._plan.refuse(target.path, f"it stands in a {fixed}, which takes no new values")
        else:
            self._plan.steps.append(SetValue(target.path, target.slot, self._plan.fresh_part(node)))

    def _absent(self, target: Target) -> None:
        self._plan.missing += [name for name, whole in live_names(target) if self._takes(name, whole)]

    def _unexpected(self, node: Node, path: Segments) -> None:
        self._plan.unexpected += [
            name for name in self._view.names_below(node, path) if self._selection.takes_whole(name)
        ]

    def _takes(self, name: str, whole: bool) -> bool:
        return self._selection.takes_whole(name) if whole else self._selection.takes(name)


def live_names(target: Target) -> list[tuple[str, bool]]:
    """Return (dotted name, whether it is taken as a whole) of all that a checkpoint would have for a target."""
    match target:
        case Branch():
            return [found for _, child in target.children for found in live_names(child)]
        case ModuleTarget():
            return [(dotted((*target.path, name)), False) for name in target.read.items]
        case OptimizerTarget() if not target.read.uses_state_dict:
            states = [dotted((*target.path, "state", name)) for name in target.read.params]
            return [*((name, False) for name in states), (dotted((*target.path, "param_groups")), True)]
        case TensorTarget():
            return [(dotted(target.path), False)]
        case _:
            return [(dotted(target.path), True)]


def _refuse_idle_patterns(targets: Targets, view: CheckpointView) -> None:
    if targets.selection.everything:
        return
    live = [name for name, _ in live_names(targets.root)]
    idle = targets.selection.idle_includes([*live, *view.names_below(view.plan.tree, ())])
    if idle:
        raise ConfigError(
            f"include was refused: nothing is named {', '.join(map(repr, idle))}",
            why="neither the state nor the checkpoint has such a name",
            next=f"names are dotted, as in {', '.join(map(repr, live[:3]))}",
            argument="include",
        )


def _mismatch(plan: Plan, step: int) -> StateMismatchError:
    mismatched = [f"{name}: {why}" for name, why in plan.mismatched]
    counts = [
        f"{len(names)} {word}"
        for word, names in (
            ("missing", plan.missing),
            ("unexpected", plan.unexpected),
            ("of another kind, shape or dtype", mismatched),
        )
        if names
    ]
    why = [
        *_listed("missing in the checkpoint", plan.missing),
        *_listed("unexpected, not in the state", plan.unexpected),
        *_listed("do not fit", mismatched),
    ]
    next = "give the state what was saved; or name parts with include= and exclude="
    beyond = _beyond_the_saved_ranks(plan)
    if beyond:
        saved = plan.view.manifest.head.world_size
        known = "rank 0 alone" if saved == 1 else f"ranks 0 to {saved - 1}"
        why.append(f"each rank saved its own {', '.join(beyond)}: there are those of {known}, this is {plan.view.rank}")
        next = f"leave out what this rank makes anew, with exclude={beyond}"
    return StateMismatchError(
        f"step {step} does not fit the state: {', '.join(counts)}",
        why="; ".join(why),
        next=f"{next}, or take what fits with strict=False. Nothing live was changed",
        step=step,
        missing=tuple(plan.missing),
        unexpected=tuple(plan.unexpected),
        mismatched=tuple(mismatched),
    )


def _beyond_the_saved_ranks(plan: Plan) -> list[str]:
    """Return the missing names that are each rank's own, where this rank is none of those that saved."""
    places = {dotted(path) for path in plan.view.absent}
    if not places:
        return []
    names = [*plan.missing, *(name for name, _ in plan.mismatched)]
    return sorted(
        place
        for place in places
        # A list that holds such a place is missing as a whole.
        if any(name == place or name.startswith(f"{place}.") or place.startswith(f"{name}.") for name in names)
    )


def _listed(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f", and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return [f"{what}: {', '.join(names[:_MOST_SHOWN])}{more}"]
