"""Objects with ``state_dict`` and ``load_state_dict``: which they are, how they are read, and how they are loaded."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim.lr_scheduler import LRScheduler

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.names import Segments, dotted

__all__ = ["call_state_dict", "is_object", "load_object", "read_object"]


_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def is_object(value: object) -> bool:
    """Tell whether ``value`` is an instance that saves and loads its own state."""
    return (
        not isinstance(value, type)
        and callable(getattr(value, "state_dict", None))
        and callable(getattr(value, "load_state_dict", None))
    )


def read_object(value: Any, path: Segments) -> Any:
    """Return the state of an object: its ``state_dict()``, for some of torch's own without what that costs.

    A ``GradScaler`` is read through its tensors, because its ``state_dict()`` waits for the GPU. Functions in a
    scheduler's state are left out: no checkpoint can hold them, and the live scheduler has its own.

    Raises:
        UnsupportedValueError: ``state_dict()`` raised; the error is its cause.
    """
    if isinstance(value, GradScaler) and type(value).state_dict is GradScaler.state_dict:
        return _read_scaler(value)
    state = call_state_dict(value, path)
    return _without_functions(state) if isinstance(value, LRScheduler) and isinstance(state, dict) else state


def call_state_dict(value: Any, path: Segments, **arguments: Any) -> Any:
    """Call ``value.state_dict(**arguments)``, which is the user's code.

    Raises:
        UnsupportedValueError: It raised; the error is its cause.
    """
    try:
        return value.state_dict(**arguments)
    except Exception as exc:
        raise UnsupportedValueError(
            f"{dotted(path)!r} cannot be saved: its state_dict() raised {type(exc).__name__}: {exc}",
            why="a checkpoint asks each object for its state",
            next="mend what the error above names, or leave the object out of the state",
            key=dotted(path),
            type_name=type(value).__qualname__,
        ) from exc


def load_object(value: Any, state: Any) -> None:
    """Give an object its state back; ``state`` is fresh, the object may keep it.

    What the object raises is passed on as it is.
    """
    if isinstance(value, GradScaler) and isinstance(state, dict):
        state = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    value.load_state_dict(state)


def _read_scaler(scaler: GradScaler) -> dict[str, Any]:
    if not scaler.is_enabled():
        return {}
    return {
        "scale": scaler._init_scale if scaler._scale is None else scaler._scale,
        "growth_factor": scaler.get_growth_factor(),
        "backoff_factor": scaler.get_backoff_factor(),
        "growth_interval": scaler.get_growth_interval(),
        "_growth_tracker": (scaler._init_growth_tracker if scaler._growth_tracker is None else scaler._growth_tracker),
    }


def _without_functions(state: dict[str, Any]) -> dict[str, Any]:
    """Return a scheduler's state without functions; ``SWALR`` of torch < 2.9 has one, also inside a chain."""
    return {
        key: [_without_functions(inner) if isinstance(inner, dict) else inner for inner in value]
        if key == "_schedulers" and isinstance(value, list)
        else value
        for key, value in state.items()
        if not isinstance(value, _FUNCTIONS)
    }
