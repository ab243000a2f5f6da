from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel

from aiockpt.state.collect import collect
from aiockpt.state.objects import load_object
from tests.state.rebuild import round_trip, same

STEPS = 4


class Decay:
    """A callable with state of its own, as LambdaLR saves it."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, epoch: int) -> float:
        return self.rate**epoch


def _sequential(optimizer: optim.Optimizer) -> Any:
    parts: list[Any] = [
        lr_scheduler.ConstantLR(optimizer),
        lr_scheduler.ExponentialLR(optimizer, 0.9),
        SWALR(optimizer, 0.1),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2, 6])


MAKERS: dict[str, Any] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 2, 5]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": _sequential,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=True),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=5),
    "SWALR linear": lambda o: SWALR(o, 0.05, anneal_epochs=5, anneal_strategy="linear"),
    "LambdaLR of an object": lambda o: lr_scheduler.LambdaLR(o, Decay(0.8)),
    "CyclicLR exp_range": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, mode="exp_range", gamma=0.9),
    "CyclicLR own scale": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, scale_fn=lambda x: 0.5),
}


def make(name: str, lr: Any) -> tuple[nn.Module, optim.Optimizer, Any]:
    model = nn.Linear(1, 1)
    optimizer = optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return model, optimizer, MAKERS[name](optimizer)


def go_on(optimizer: optim.Optimizer, scheduler: Any, steps: int) -> list[Any]:
    rates = []
    for step in range(steps):
        optimizer.step()
        scheduler.step(*([1.0 + step] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
    return rates


def test_every_scheduler_of_torch_is_in_the_table():
    """A scheduler that torch adds has to be tried here."""
    kinds = set(lr_scheduler.__all__) - {"LRScheduler"}
    assert kinds <= MAKERS.keys()


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
@pytest.mark.parametrize("name", MAKERS)
def test_every_scheduler_goes_on_where_it_was(name: str, lr: Any):
    """State of a scheduler, loaded into a fresh one, gives the learning rates of the one that went on."""
    if isinstance(lr, torch.Tensor):
        lr = lr.clone()
    _, optimizer, scheduler = make(name, lr)
    go_on(optimizer, scheduler, STEPS)
    saved = round_trip(
        {"s": scheduler, "groups": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]}
    )
    _, fresh_optimizer, fresh = make(name, 0.5 if isinstance(lr, float) else torch.tensor(0.5))
    for group, values in zip(fresh_optimizer.param_groups, saved["groups"], strict=True):
        group.update(values)
    load_object(fresh, saved["s"])
    assert go_on(fresh_optimizer, fresh, STEPS) == go_on(optimizer, scheduler, STEPS)


def test_a_scheduler_without_tensors_is_one_value():
    """The largest part of an object's state without tensors is one value."""
    _, _, scheduler = make("MultiStepLR", 0.5)
    collected = collect({"s": scheduler})
    assert collected.tree == {"s": -1}
    assert collected.entries == []


def test_functions_in_a_schedulers_state_are_left_out():
    """Older SWALR has its annealing function in its state, also inside of a chain; the live one keeps its own."""

    class Old(SWALR):
        def state_dict(self) -> dict[str, Any]:
            return {key: value for key, value in self.__dict__.items() if key != "optimizer"}

    model = nn.Linear(1, 1)
    optimizer = optim.SGD(model.parameters(), lr=0.5)
    chain = lr_scheduler.ChainedScheduler([Old(optimizer, 0.1), lr_scheduler.ConstantLR(optimizer)])
    saved = round_trip({"s": chain})["s"]
    assert "anneal_func" in chain.state_dict()["_schedulers"][0]
    assert "anneal_func" not in saved["_schedulers"][0]
    assert saved["_schedulers"][1] == chain.state_dict()["_schedulers"][1]


def test_an_averaged_model_is_a_module_of_its_own():
    """AveragedModel holds a module called ``module``, which is no wrapper's."""
    model = AveragedModel(nn.Linear(1, 1))
    saved = round_trip({"ema": model})["ema"]
    assert list(saved) == ["n_averaged", "module.weight", "module.bias"]
    assert same(saved, {name: item.detach() for name, item in model.state_dict().items()})


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_a_grad_scaler_round_trips_without_its_state_dict(
    enabled: bool, stepped: bool, monkeypatch: pytest.MonkeyPatch
):
    """It is read through its tensors, which need no wait for a GPU; disabled, or not used yet, too."""

    def make() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2, enabled=enabled)

    scaler, fresh = make(), make()
    if stepped:
        model = nn.Linear(1, 1)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            scaler.scale(model(torch.ones(1)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        fresh.scale(torch.ones(1))  # its tensors exist, and must be written
    expected = scaler.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "item", lambda self: pytest.fail("item() waits for the GPU"))
        collected = collect({"scaler": scaler})
    assert len(collected.entries) == (2 if enabled and stepped else 0)
    load_object(fresh, round_trip({"scaler": scaler})["scaler"])
    assert same(fresh.state_dict(), expected)
    assert fresh.get_scale() == scaler.get_scale()


def test_a_scaler_with_its_own_state_dict_is_asked():
    """A subclass that saves more is an object like any other."""

    class Own(torch.amp.GradScaler):
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "mine": 2}

    assert round_trip({"s": Own("cpu")})["s"]["mine"] == 2
