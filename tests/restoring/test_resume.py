"""A training that is interrupted and resumed gives the losses of one that was not, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

from aiockpt.errors import StateMismatchError
from aiockpt.state.rng import RNG
from tests.restoring.restoring import restore
from tests.restoring.writing import write_step

CLASSES = {
    name: kind
    for name in optim.__all__
    if isinstance(kind := getattr(optim, name), type)
    and issubclass(kind, optim.Optimizer)
    and kind is not optim.Optimizer
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in CLASSES]
VARIANTS += [
    ("SGD", {"momentum": 0.9}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("Adam", {"amsgrad": True}),
    ("Adam", {"fused": True}),
    ("AdamW", {"foreach": True}),
    ("AdamW", {"capturable": False, "lr": torch.tensor(0.01)}),
    ("LBFGS", {"line_search_fn": "strong_wolfe", "history_size": 3}),
]


class Run:
    """A small training, deterministic but for the state that a checkpoint holds."""

    def __init__(self, name: str, arguments: dict[str, Any], *, seed: int = 0, reverse: bool = False) -> None:
        torch.manual_seed(seed)
        sparse = name == "SparseAdam"
        layers: list[nn.Module] = [nn.Embedding(5, 3, sparse=sparse)]
        if not sparse:
            layers += [nn.Linear(3, 4, bias=name != "Muon"), nn.Linear(4, 2, bias=name != "Muon")]
        self.model = nn.Sequential(*layers)
        parameters = list(self.model.parameters())
        copied = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
        given = parameters[::-1] if reverse else parameters
        self.optimizer = CLASSES[name](given, **{"lr": 0.01, **copied})
        self.state = {"model": self.model, "optimizer": self.optimizer}

    def train(self, steps: int) -> list[float]:
        losses = []
        for step in range(steps):
            inputs = torch.tensor([0, step % 5, 3])

            def closure(inputs: torch.Tensor = inputs) -> torch.Tensor:
                self.optimizer.zero_grad()
                loss: torch.Tensor = self.model(inputs).square().sum()
                loss.backward()
                return loss

            loss = self.optimizer.step(closure)  # type: ignore[arg-type]  # torch wants a closure that returns float
            losses.append(torch.as_tensor(loss).detach().item())
        return losses


def ident(value: object) -> str:
    return str(value).replace(" ", "")


@pytest.mark.parametrize(("name", "arguments"), VARIANTS, ids=ident)
@pytest.mark.parametrize("already", [0, 2], ids=["no-state-yet", "with-state"])
def test_every_optimizer_resumes_bit_for_bit(name: str, arguments: dict[str, Any], already: int, tmp_path: Path):
    """Into a fresh optimizer without any state, and over the state of other steps."""
    run = Run(name, arguments)
    run.train(3)
    write_step(tmp_path, 3, run.state)
    expected = run.train(4)
    resumed = Run(name, arguments, seed=1)
    resumed.train(already)
    restore(tmp_path, resumed.state)
    assert resumed.train(4) == expected
    assert_same_optimizer(resumed.optimizer, run.optimizer)


@pytest.mark.parametrize(("name", "arguments"), VARIANTS, ids=ident)
def test_another_parameter_order_loads(name: str, arguments: dict[str, Any], tmp_path: Path):
    """State goes by name; LBFGS alone, which has one flat state, refuses."""
    run = Run(name, arguments)
    run.train(3)
    write_step(tmp_path, 3, run.state)
    expected = run.train(4)
    resumed = Run(name, arguments, seed=1, reverse=True)
    if name == "LBFGS":
        with pytest.raises(StateMismatchError, match="LBFGS"):
            restore(tmp_path, resumed.state)
        return
    restore(tmp_path, resumed.state)
    assert resumed.train(4) == expected


def assert_same_optimizer(first: optim.Optimizer, second: optim.Optimizer) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert repr(a["param_groups"]) == repr(b["param_groups"])
    assert a["state"].keys() == b["state"].keys()
    for key, state in a["state"].items():
        assert repr(state) == repr(b["state"][key])


def test_bf16_parameters_keep_their_fp32_state(tmp_path: Path):
    """torch's own load_state_dict would cast it to bf16."""

    def make(seed: int) -> tuple[nn.Module, optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Linear(4, 4).to(torch.bfloat16)
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        for param in model.parameters():
            optimizer.state[param] = {
                "step": torch.tensor(2.0),
                "exp_avg": torch.randn(param.shape) * 1e-3,
                "exp_avg_sq": torch.rand(param.shape) * 1e-3,
            }
        return model, optimizer

    model, optimizer = make(0)
    write_step(tmp_path, 1, {"model": model, "optimizer": optimizer})
    for existing in (True, False):
        other, fresh = make(1)
        if not existing:
            fresh.state.clear()
        restore(tmp_path, {"model": other, "optimizer": fresh})
        for param, saved in zip(other.parameters(), model.parameters(), strict=True):
            assert torch.equal(param, saved)
            for key, value in optimizer.state[saved].items():
                found = fresh.state[param][key]
                assert found.dtype is torch.float32
                assert torch.equal(found, value)


def test_state_of_another_dtype_is_replaced_by_the_saved_one(tmp_path: Path):
    """Live bf16 state gives way to fp32 state."""
    run, resumed = Run("AdamW", {}), Run("AdamW", {}, seed=1)
    run.train(2)
    resumed.train(2)
    for state in resumed.optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].bfloat16()
    write_step(tmp_path, 1, run.state)
    restore(tmp_path, resumed.state)
    assert_same_optimizer(resumed.optimizer, run.optimizer)


def test_live_state_tensors_stay_the_same_objects(tmp_path: Path):
    """Compiled steps and captured graphs hold on to them."""
    run, resumed = Run("AdamW", {"lr": torch.tensor(0.5)}), Run("AdamW", {"lr": torch.tensor(0.01)}, seed=1)
    run.train(3)
    resumed.train(1)
    before = [(key, id(value)) for state in resumed.optimizer.state.values() for key, value in state.items()]
    rate = resumed.optimizer.param_groups[0]["lr"]
    write_step(tmp_path, 1, run.state)
    restore(tmp_path, resumed.state)
    after = [(key, id(value)) for state in resumed.optimizer.state.values() for key, value in state.items()]
    assert after == before
    assert resumed.optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5


def test_parameters_without_a_gradient_have_no_state_afterwards(tmp_path: Path):
    """Frozen ones too; live state that the checkpoint has not is removed."""

    def make(used: int) -> tuple[nn.ModuleList, optim.Optimizer]:
        model = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
        model[2].weight.requires_grad_(False)
        optimizer = optim.AdamW(model.parameters())
        model[used](torch.ones(2)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = make(0)
    other, fresh = make(1)
    write_step(tmp_path, 1, {"model": model, "optimizer": optimizer})
    restore(tmp_path, {"model": other, "optimizer": fresh})
    assert list(fresh.state) == [other[0].weight]
    assert torch.equal(other[2].weight, model[2].weight)
    assert not other[2].weight.requires_grad


def test_a_resumed_program_goes_on_as_the_one_that_was_not_interrupted(tmp_path: Path):
    """Model with BatchNorm and dropout, schedulers, all random generators, values."""

    def make(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        warmup = optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
        cosine = optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        scheduler = optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[4])
        progress = {"step": 0, "history": [], "array": np.zeros(3)}
        return {
            "model": model,
            "optimizer": optimizer,
            "scheduler": scheduler,
            "rng": RNG(),
            "progress": progress,
        }

    def train(state: dict[str, Any], steps: int) -> list[Any]:
        losses = []
        for _ in range(steps):
            inputs = torch.randn(8, 3) * random.random() + float(np.random.rand())
            loss = state["model"](inputs).square().mean()
            state["optimizer"].zero_grad()
            loss.backward()
            state["optimizer"].step()
            state["scheduler"].step()
            state["progress"]["step"] += 1
            state["progress"]["history"].append(loss.item())
            state["progress"]["array"][0] += loss.item()
            losses.append((loss.item(), state["optimizer"].param_groups[0]["lr"]))
        return losses

    state = make(0)
    train(state, 5)
    write_step(tmp_path, 5, state)
    expected = train(state, 6)
    resumed = make(7)
    array = resumed["progress"]["array"]
    train(resumed, 1)
    restore(tmp_path, resumed)
    assert resumed["progress"]["step"] == 5
    assert resumed["progress"]["array"] is array
    assert train(resumed, 6) == expected
    assert resumed["progress"]["history"] == state["progress"]["history"]
    assert (resumed["progress"]["array"] == state["progress"]["array"]).all()


def test_grad_scalers_are_restored_by_value(tmp_path: Path):
    """Also into one whose tensors do not exist yet."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=7)
    scaler.scale(torch.ones(1))
    write_step(tmp_path, 1, {"scaler": scaler})
    for used in (False, True):
        fresh = torch.amp.GradScaler("cpu")
        if used:
            fresh.scale(torch.ones(1))
        restore(tmp_path, {"scaler": fresh})
        assert fresh.get_scale() == 1024.0
        assert fresh.state_dict() == scaler.state_dict()
