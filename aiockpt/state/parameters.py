"""The names of parameters: the path of their module in the state, then the name in the module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from aiockpt.format.names import Segments, dotted
from aiockpt.format.values import MAX_DEPTH
from aiockpt.state.modules import Place, places, unwrap
from aiockpt.state.per_rank import PerRank
from aiockpt.state.values import key_segment, too_deep

__all__ = ["add_module_names", "add_name", "parameter_names"]


def parameter_names(state: Mapping[Any, Any]) -> dict[int, str]:
    """Return the name of every parameter in a nested state, by ``id`` of the Parameter.

    Parameters of modules, and leaf tensors with ``requires_grad`` that stand in the state as they are. One with
    several names has the first in sorted order: ``model.layers.0.weight``. The ids are valid while the state lives.

    Raises:
        UnsupportedValueError: A mapping has a key that no checkpoint keeps, or a module or container holds itself.
    """
    names: dict[int, str] = {}

    def visit(item: Any, path: Segments, depth: int) -> None:
        if isinstance(item, nn.Module):
            add_module_names(names, places(unwrap(item), path), path)
        elif isinstance(item, torch.Tensor):
            add_name(names, item, dotted(path))
        elif depth > MAX_DEPTH:
            raise too_deep(item, path)
        elif isinstance(item, PerRank):
            visit(item.value, path, depth + 1)
        elif isinstance(item, Mapping):
            for key, child in item.items():
                visit(child, (*path, key_segment(key, path)), depth + 1)
        elif type(item) in (list, tuple):
            for index, child in enumerate(item):
                visit(child, (*path, str(index)), depth + 1)

    visit(state, (), 0)
    return names


def add_name(names: dict[int, str], tensor: torch.Tensor, name: str) -> None:
    """Add one tensor's name if an optimizer may own it; of two names the first in sorted order stays."""
    if tensor.requires_grad and tensor.is_leaf:
        known = names.get(id(tensor))
        if known is None or name < known:  # code points sort as UTF-8 bytes do
            names[id(tensor)] = name


def add_module_names(names: dict[int, str], all_places: Sequence[Place], path: Segments) -> None:
    """Add the names of the parameters, frozen ones too, of a module that stands at ``path`` in the state."""
    prefix = dotted(path)
    for place in all_places:
        start = f"{prefix}.{place.name}" if prefix else place.name
        for name, parameter in place.module._parameters.items():
            if parameter is not None:
                full = start + name
                known = names.get(id(parameter))
                if known is None or full < known:
                    names[id(parameter)] = full
