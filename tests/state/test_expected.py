"""The state that optimizers will have is known before their first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from aiockpt.planning.local import Entry
from aiockpt.state.collect import collect
from aiockpt.state.expected import expected_entries

MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "Adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW, tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3)),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4).to(torch.bfloat16), nn.LayerNorm(4))


def step(module: nn.Module, optimizer: Optimizer) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def entries(state: dict[str, Any]) -> set[Entry]:
    return set(collect(state).entries)


@pytest.mark.parametrize("name", MAKERS)
def test_expected_is_what_the_first_step_makes(name: str) -> None:
    module = model()
    optimizer = MAKERS[name](module.parameters())
    state = {"model": module, "optimizer": optimizer}
    before = entries(state)
    expected = expected_entries(collect(state))
    assert entries(state) == before
    step(module, optimizer)
    assert set(expected) == entries(state) - before
    assert expected_entries(collect(state)) == []


def test_frozen_parameters_get_none() -> None:
    """Nor do those that have their state already."""
    module = model()
    module[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(module.parameters())
    step(module, optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    state = {"model": module, "new": list(optimizer.param_groups[1]["params"]), "optimizer": optimizer}
    assert {entry.shape for entry in expected_entries(collect(state))} == {(3,), ()}


def test_an_optimizer_that_cannot_step_so_is_passed_over() -> None:
    """And hooks are not called, of this optimizer or of all."""
    module = model()
    called: list[Optimizer] = []
    hooks = [register_optimizer_step_pre_hook(lambda optimizer, *_: called.append(optimizer))]
    optimizers = {
        "lbfgs": torch.optim.LBFGS(module[0].parameters()),
        "sgd": torch.optim.SGD([nn.Parameter(torch.ones(2))]),
    }
    hooks.append(optimizers["sgd"].register_step_post_hook(lambda optimizer, *_: called.append(optimizer)))
    try:
        assert expected_entries(collect({"model": module, **optimizers})) == []
    finally:
        for hook in hooks:
            hook.remove()
    assert called == []
