"""The state that optimizers will have after their first step, so that memory can be made for it before."""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from aiockpt.format.names import Segments, dotted
from aiockpt.planning.local import Entry
from aiockpt.planning.placings import UNDECLARED, Placing
from aiockpt.state.collected import Collected
from aiockpt.state.dtypes import stored_form
from aiockpt.state.optimizers import OptimizerItems
from aiockpt.state.sharded import is_sharded

__all__ = ["expected_entries"]

_log = logging.getLogger("aiockpt.state")


def expected_entries(collected: Collected) -> list[Entry]:
    """Return the tensors that the next step of the collected optimizers will add to their state.

    Found by a step of a twin on torch's meta device, which computes shapes and nothing else. An optimizer that cannot
    take one (LBFGS needs a closure) is passed over: its state is then met by the first save.
    """
    entries: list[Entry] = []
    placings: dict[str, Placing] = {}
    if collected.placer.ranks.world > 1:
        placings = {dotted(entry.segments): entry.placing for entry in collected.entries}

    def placing_of(name: str, parameter: torch.Tensor) -> Placing:
        if is_sharded(parameter):
            return placings.get(name, UNDECLARED)
        return collected.replicas.get(id(parameter), UNDECLARED)

    for path, item, read in collected.objects:
        if isinstance(item, Optimizer) and isinstance(read, OptimizerItems) and not read.uses_state_dict:
            try:
                entries += _of_optimizer(item, read, path, placing_of)
            except Exception:  # noqa: BLE001  # the step of any optimizer there is; without it only time is lost
                _log.debug("the state of %s is not known before its first step", type(item).__qualname__, exc_info=True)
    collected.placer.declare(entries)
    return entries


def _of_optimizer(
    optimizer: Optimizer, read: OptimizerItems, path: Segments, placing_of: Callable[[str, torch.Tensor], Placing]
) -> Iterator[Entry]:
    known: dict[Any, dict[str, torch.Tensor]] = {}
    for name, parameter in read.params.items():
        sharded = is_sharded(parameter)
        if name in read.state or not parameter.requires_grad or not (sharded or type(parameter) is torch.nn.Parameter):
            continue
        group = read.group_of[name]
        kind = (group, parameter.shape, parameter.dtype, parameter.is_cuda)
        if kind not in known:
            known[kind] = _state_of_one(optimizer, optimizer.param_groups[group], parameter)
        placing = placing_of(name, parameter)
        for key, tensor in known[kind].items():
            form = stored_form(tensor.dtype, tuple(tensor.shape))
            if form is not None:
                # Beside a DTensor what has another shape, as "step" has, is a plain tensor.
                mine = UNDECLARED if sharded and tensor.shape != parameter.shape else placing
                yield Entry((*path, "state", name, str(key)), *form, mine)


def _state_of_one(optimizer: Optimizer, group: Mapping[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the state of one parameter after a step, on the meta device where the parameter would be."""
    like = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta") if is_sharded(parameter) else parameter
    meta = torch.empty_like(like, device="meta").requires_grad_()
    meta.grad = torch.empty_like(meta)
    # The implementations for many tensors at once take no meta tensors; the state is the same.
    plain = {"foreach": False, "fused": False, "capturable": False} if "foreach" in group else {}
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    twin.__dict__ |= {
        "state": defaultdict(dict),
        "param_groups": [{**group, **plain, "params": [meta]}],
        "_optimizer_step_pre_hooks": OrderedDict(),
        "_optimizer_step_post_hooks": OrderedDict(),
    }
    step: Any = type(optimizer).step
    # Without the hooks of all optimizers, which know nothing of a twin: torch wraps them around it, dynamo once more.
    while getattr(step, "hooked", False) and hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    step(twin)
    return {key: value for key, value in twin.state[meta].items() if isinstance(value, torch.Tensor)}
