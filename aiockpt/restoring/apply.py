"""The part of a restore that runs user code: values and objects get theirs, in the caller's thread."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from aiockpt.errors import StateMismatchError
from aiockpt.format.names import dotted
from aiockpt.restoring.plan import Fresh, LoadModule, LoadObject, LoadOptimizer, SetState, SetValue, Step
from aiockpt.restoring.regions import local_memory
from aiockpt.state.modules import raw_state_dict
from aiockpt.state.objects import load_object
from aiockpt.state.rng import RNG
from aiockpt.state.sharded import is_sharded

__all__ = ["MIXED", "apply_steps", "bump_versions"]

MIXED = "the live state is a mixture of what it was and of a checkpoint: do not train on it, restore or start again"


def apply_steps(steps: Iterable[Step]) -> tuple[list[str], list[str]]:
    """Finish a restore whose bytes were read.

    Modules come first, then optimizers, then other objects and values, as a scheduler may look at its optimizer; the
    random number generators are last, because loading may draw from them.

    Returns:
        (missing, unexpected): further dotted names, that modules with loading of their own reported.

    Raises:
        StateMismatchError: A module with loading of its own refused; the live state is a mixture.
        Exception: What an object's own code raised, with a note that says so.
    """
    missing: list[str] = []
    unexpected: list[str] = []
    for step in sorted(steps, key=_order):
        with _named(step):
            match step:
                case LoadModule():
                    found = _load_module(step)
                    missing += found[0]
                    unexpected += found[1]
                case LoadOptimizer():
                    _load_optimizer(step)
                case LoadObject() if isinstance(step.object, Optimizer):
                    _load_by_itself(step.object, step.value.value)
                case LoadObject():
                    load_object(step.object, step.value.value)
                case SetValue():
                    _set_value(step)
    return missing, unexpected


def bump_versions(tensors: Iterable[torch.Tensor]) -> None:
    """Tell autograd that tensors were overwritten, so that a graph from before refuses its backward pass."""
    counted = [tensor for tensor in tensors if not tensor.is_inference()]
    counted += [local_memory(tensor) for tensor in counted if is_sharded(tensor)]  # which counts apart
    torch.autograd.graph.increment_version(counted)


def _order(step: Step) -> int:
    match step:
        case LoadModule():
            return 0
        case LoadOptimizer():
            return 1
        case LoadObject() if isinstance(step.object, Optimizer):
            return 1
        case LoadObject() if isinstance(step.object, RNG):
            return 3
        case _:
            return 2


@contextmanager
def _named(step: Step) -> Iterator[None]:
    try:
        yield
    except Exception as exc:
        exc.add_note(f"while {dotted(step.path)!r} was being restored; {MIXED}")
        raise


def _load_module(step: LoadModule) -> tuple[list[str], list[str]]:
    items = {name: item.value if isinstance(item, Fresh) else item for name, item in step.items.items()}
    metadata = None if step.metadata is None else step.metadata.value
    state = raw_state_dict(step.read, items, metadata)
    try:
        result = step.read.module.load_state_dict(state, strict=step.strict)
    except RuntimeError as exc:
        raise StateMismatchError(
            f"{dotted(step.path)!r} refused what was saved: {exc}",
            why="the module, or a module in it, loads by code of its own, which nobody can ask beforehand",
            next=MIXED,
            missing=(),
            unexpected=(),
            mismatched=(dotted(step.path),),
        ) from exc
    prefix = dotted(step.path)
    return (
        [f"{prefix}.{name}" for name in getattr(result, "missing_keys", ())],
        [f"{prefix}.{name}" for name in getattr(result, "unexpected_keys", ())],
    )


def _load_optimizer(step: LoadOptimizer) -> None:
    state: Any = step.optimizer.state
    for holder, key in step.removed:
        (state if holder is None else holder).pop(key, None)
    for owner, holder in step.created:
        state[owner] = holder
    for assignment in step.assigned:
        _assign(assignment)


def _assign(step: SetState) -> None:
    value = step.value.value if isinstance(step.value, Fresh) else step.value
    live = step.holder.get(step.key)
    if isinstance(live, torch.Tensor) and live.numel() == 1 and isinstance(value, (int, float)):
        with torch.no_grad():
            live.fill_(value)  # a tensor lr stays one: captured graphs and compiled steps read its memory
    else:
        step.holder[step.key] = value


def _load_by_itself(optimizer: Optimizer, value: Any) -> None:
    """Call ``load_state_dict`` and give state back the dtype it was saved with: torch casts it to the parameter's."""
    saved = value.get("state", {}) if isinstance(value, dict) else {}
    wanted = {
        (owner, key): item
        for owner, items in saved.items()
        if isinstance(items, dict)
        for key, item in items.items()
        if isinstance(item, torch.Tensor)
    }
    optimizer.load_state_dict(value)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for (owner, key), item in wanted.items():
        state = optimizer.state.get(params[owner]) if isinstance(owner, int) and 0 <= owner < len(params) else None
        live = state.get(key) if isinstance(state, dict) else None
        if isinstance(live, torch.Tensor) and live.dtype != item.dtype and live.shape == item.shape:
            state[key] = item.to(live.device, copy=True)  # type: ignore[index]  # live came out of it


def _set_value(step: SetValue) -> None:
    value, live = step.value.value, step.slot.current()
    numpy = sys.modules.get("numpy")
    if (
        numpy is not None
        and type(live) is type(value) is numpy.ndarray
        and live.dtype == value.dtype
        and live.shape == value.shape
        and live.flags.writeable
    ):
        live[...] = value
    else:
        step.slot.assign(value)
