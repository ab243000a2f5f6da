from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn, optim

from aiockpt.errors import UnsupportedValueError
from aiockpt.state.collect import collect
from aiockpt.state.optimizers import (
    OptimizerItems,
    read_optimizer,
    state_device,
)
from aiockpt.state.parameters import parameter_names
from tests.state.rebuild import round_trip, same

CLASSES = {
    name: kind
    for name in optim.__all__
    if isinstance(kind := getattr(optim, name), type)
    and issubclass(kind, optim.Optimizer)
    and kind is not optim.Optimizer
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in CLASSES]
VARIANTS += [(name, {"foreach": True}) for name in CLASSES if name not in ("LBFGS", "Muon", "SparseAdam")]
VARIANTS += [(name, {"fused": True}) for name in ("Adam", "AdamW", "SGD", "Adagrad")]
VARIANTS += [
    ("SGD", {"momentum": 0.9}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {"lr": torch.tensor(0.01)}),
    ("LBFGS", {"line_search_fn": "strong_wolfe", "history_size": 3}),
    ("Adafactor", {"foreach": False}),
    ("SGD", {"maximize": True, "differentiable": False, "weight_decay": 0.1}),
]


def make(name: str, arguments: dict[str, Any]) -> tuple[nn.Module, optim.Optimizer]:
    torch.manual_seed(1)
    sparse = name == "SparseAdam"
    layers: list[nn.Module] = [nn.Embedding(5, 3, sparse=sparse)]
    if not sparse:
        layers.append(nn.Linear(3, 2, bias=name != "Muon"))
    model = nn.Sequential(*layers)
    arguments = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    return model, CLASSES[name](model.parameters(), **{"lr": 0.01, **arguments})


def train(
    model: nn.Module, optimizer: optim.Optimizer, steps: int, between: Callable[[], object] = lambda: None
) -> list[bytes]:
    losses = []
    for step in range(steps):
        inputs = torch.tensor([0, step % 5, 3])

        def closure(inputs: torch.Tensor = inputs) -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = model(inputs).square().sum()
            loss.backward()
            return loss

        loss = optimizer.step(closure)  # type: ignore[arg-type]  # torch wants a closure that returns float
        losses.append(torch.as_tensor(loss).detach().numpy().tobytes())
        between()
    return losses


@pytest.mark.parametrize(("name", "arguments"), VARIANTS, ids=str)
def test_training_is_bit_equal_with_and_without_collect(name: str, arguments: dict[str, Any]):
    """Reading the state between any two steps changes no loss, no parameter and no state of any optimizer."""
    alone, watched = make(name, arguments), make(name, arguments)
    losses = train(*alone, 5)

    def look() -> None:
        collect({"model": watched[0], "optimizer": watched[1]})

    look()
    assert train(*watched, 5, look) == losses
    assert same(list(alone[0].state_dict().values()), list(watched[0].state_dict().values()))
    assert same(alone[1].state_dict(), watched[1].state_dict())


@pytest.mark.parametrize(("name", "arguments"), VARIANTS, ids=str)
def test_state_by_name_is_all_that_the_next_steps_need(name: str, arguments: dict[str, Any]):
    """State put back by name into a fresh optimizer gives the losses of the one that went on."""
    model, optimizer = make(name, arguments)
    train(model, optimizer, 3)
    saved = round_trip({"model": model, "optimizer": optimizer})
    expected = train(model, optimizer, 3)
    fresh_model, fresh = make(name, arguments)
    fresh_model.load_state_dict(saved["model"])
    put_back(fresh_model, fresh, saved["optimizer"])
    assert train(fresh_model, fresh, 3) == expected
    assert same(fresh.state_dict(), optimizer.state_dict())


def put_back(model: nn.Module, optimizer: optim.Optimizer, saved: dict[str, Any]) -> None:
    """What a restore does with an optimizer."""
    read = read_optimizer(optimizer, parameter_names({"model": model}))
    optimizer.state.clear()
    for name, state in saved["state"].items():
        optimizer.state[read.params[name]] = state
    for group, stored in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in stored.items() if key != "params"})


def test_an_optimizer_stands_under_its_parameters_names():
    """State is by parameter name, groups keep their hyperparameters with their types, and user keys."""
    model = nn.Sequential(nn.Linear(2, 1))
    optimizer = optim.AdamW(
        [{"params": [model[0].weight], "tag": ("decay", 1)}, {"params": [model[0].bias], "lr": 0.5}], betas=(0.8, 0.9)
    )
    model(torch.ones(2)).backward()
    optimizer.step()
    saved = round_trip({"model": model, "optimizer": optimizer})["optimizer"]
    assert list(saved["state"]) == ["model.0.weight", "model.0.bias"]
    assert sorted(saved["state"]["model.0.weight"]) == ["exp_avg", "exp_avg_sq", "step"]
    assert [group["params"] for group in saved["param_groups"]] == [["model.0.weight"], ["model.0.bias"]]
    assert saved["param_groups"][0]["tag"] == ("decay", 1)
    assert saved["param_groups"][0]["betas"] == (0.8, 0.9)
    assert saved["param_groups"][1]["lr"] == 0.5
    collected = collect({"model": model, "optimizer": optimizer})
    assert ("optimizer", "state", "model.0.weight", "exp_avg") in [entry.segments for entry in collected.entries]
    assert "shared" not in collected.tree["optimizer"]


def test_collect_takes_no_step_and_makes_no_gradient():
    """A fresh optimizer stays without state, and parameters without gradients."""
    model, optimizer = make("AdamW", {})
    versions = [parameter._version for parameter in model.parameters()]
    collected = collect({"model": model, "optimizer": optimizer})
    assert collected.tree["optimizer"]["state"] == {}
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter._version for parameter in model.parameters()] == versions


def test_an_optimizer_may_come_before_its_module():
    """The order of the state's keys does not matter for names."""
    model, optimizer = make("SGD", {})
    assert collect({"a": optimizer, "b": model}).objects[-1].read.param_names == [
        ["b.0.weight", "b.1.weight", "b.1.bias"]
    ]  # type: ignore[union-attr]


def test_one_optimizer_over_modules_with_equal_names():
    """Names have the module's path, so that two layers of one name stay apart."""
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    optimizer = optim.Adam([*first.parameters(), *second.parameters()])
    (first(torch.ones(1)) + second(torch.ones(1))).backward()
    optimizer.step()
    saved = round_trip({"nets": {"a": first, "b": second}, "optimizer": optimizer})
    assert list(saved["optimizer"]["state"]) == ["nets.a.weight", "nets.a.bias", "nets.b.weight", "nets.b.bias"]


def test_tied_parameters_are_one_state():
    """A parameter with two names has its state once, under the first in sorted order."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[0].weight = model[1].weight
    optimizer = optim.Adam(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    assert list(round_trip({"m": model, "o": optimizer})["o"]["state"]) == ["m.0.weight"]


def test_frozen_parameters_and_those_without_a_gradient_have_no_state():
    """Only what a step has touched is stored; all names stand in the groups."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1))
    model[1].requires_grad_(False)
    optimizer = optim.Adam(model.parameters())
    model[0](torch.ones(1)).backward()
    optimizer.step()
    optimizer.state[model[2].weight]  # a look makes an empty entry
    saved = round_trip({"m": model, "o": optimizer})["o"]
    assert list(saved["state"]) == ["m.0.weight", "m.0.bias"]
    assert len(saved["param_groups"][0]["params"]) == 6


def test_parameters_without_any_module_are_named_by_group_and_index():
    """Where no parameter has a name, group and index are the names."""
    first, second = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = optim.SGD([{"params": [first]}, {"params": [second]}], lr=0.1, momentum=0.9)
    (first.sum() + second.sum()).backward()
    optimizer.step()
    saved = round_trip({"o": optimizer})["o"]
    assert list(saved["state"]) == ["0.0", "1.0"]
    assert [group["params"] for group in saved["param_groups"]] == [["0.0"], ["1.0"]]


def test_tensors_of_the_state_name_themselves():
    """A leaf that requires a gradient and stands in the state gives its path as the name."""
    model, alpha = nn.Linear(1, 1), torch.zeros((), requires_grad=True)
    optimizer = optim.SGD([*model.parameters(), alpha], lr=0.1)
    state = {"model": model, "extra": {"alpha": alpha}, "more": [nn.Parameter(torch.ones(1))], "optimizer": optimizer}
    assert parameter_names(state)[id(alpha)] == "extra.alpha"
    assert round_trip(state)["optimizer"]["param_groups"][0]["params"] == ["model.weight", "model.bias", "extra.alpha"]


def test_an_optimizer_with_some_names_must_have_all():
    """A forgotten module is an error that says which parameters have no name, and where they stand."""
    model, forgotten = nn.Linear(1, 1), nn.Linear(7, 3)
    optimizer = optim.SGD([{"params": model.parameters()}, {"params": forgotten.parameters()}], lr=0.1)
    with pytest.raises(UnsupportedValueError) as caught:
        collect({"model": model, "o": {"pt": optimizer}})
    assert caught.value.key == "o.pt"
    assert caught.value.type_name == "SGD"
    assert "1.0 (shape [3, 7]), 1.1 (shape [3])" in caught.value.why
    assert "'model.bias'" in caught.value.why


def test_state_of_a_tensor_outside_of_the_groups_is_refused():
    """State whose parameter is in no group cannot be named."""
    model, optimizer = make("SGD", {})
    optimizer.state[torch.ones(1)]["x"] = 1
    with pytest.raises(UnsupportedValueError, match="none of its groups"):
        collect({"m": model, "o": optimizer})


def test_state_under_keys_that_are_no_parameters_is_kept_apart():
    """Some optimizers keep a counter in their state; it stands under ``shared``."""
    model, optimizer = make("SGD", {})
    optimizer.state["count"] = 3  # type: ignore[index]
    optimizer.state[("a", 1)] = {"t": torch.ones(2)}  # type: ignore[index]
    saved = round_trip({"m": model, "o": optimizer})["o"]
    assert same(saved["shared"], {"count": 3, ("a", 1): {"t": torch.ones(2)}})


def test_state_of_any_shape_and_type_round_trips():
    """LBFGS has lists of tensors and None; others have text, tuples, or no dict at all."""
    model, optimizer = make("SGD", {})
    weight, inner, bias = model.parameters()
    optimizer.state[weight] = {"list": [torch.ones(1), None, (torch.zeros(2), 3)], "none": None, 5: "int key"}
    optimizer.state[inner] = torch.arange(3)  # type: ignore[assignment]
    optimizer.state[bias] = {"only": 1, "values": "x"}
    expected = {
        "m.0.weight": {"list": [torch.ones(1), None, (torch.zeros(2), 3)], "none": None, 5: "int key"},
        "m.1.weight": torch.arange(3),
        "m.1.bias": {"only": 1, "values": "x"},
    }
    collected = collect({"m": model, "o": optimizer})
    assert isinstance(collected.tree["o"]["state"]["m.1.bias"], dict)  # each key of a state is a node
    assert same(round_trip({"m": model, "o": optimizer})["o"]["state"], expected)


def test_a_tensor_lr_makes_the_groups_a_container():
    """Tensors inside of groups are entries."""
    model, optimizer = make("AdamW", {"lr": torch.tensor(0.25)})
    collected = collect({"m": model, "o": optimizer})
    assert ("o", "param_groups", "0", "lr") in [entry.segments for entry in collected.entries]
    saved = round_trip({"m": model, "o": optimizer})["o"]["param_groups"][0]
    assert same(saved["lr"], torch.tensor(0.25))
    assert saved["betas"] == (0.9, 0.999)


class OwnState(optim.SGD):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "mine": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict.pop("mine") == 1
        super().load_state_dict(state_dict)


@pytest.mark.parametrize("kind", ["override", "hook", "load hook"])
def test_an_optimizer_with_its_own_state_dict_is_asked(kind: str):
    """Overrides and the user's hooks are respected: the optimizer is the tree of its ``state_dict()``."""
    model = nn.Linear(1, 1)
    optimizer: optim.Optimizer = OwnState(model.parameters(), lr=0.1, momentum=0.9)
    if kind != "override":
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if kind == "hook":
            optimizer.register_state_dict_post_hook(lambda optimizer, state: {**state, "mine": 1})
        else:
            optimizer.register_load_state_dict_pre_hook(lambda optimizer, state: state)
    model(torch.ones(1)).backward()
    optimizer.step()
    collected = collect({"m": model, "o": optimizer})
    read = collected.objects[-1].read
    assert isinstance(read, OptimizerItems)
    assert read.uses_state_dict
    saved = round_trip({"m": model, "o": optimizer})["o"]
    assert saved.get("mine") == (None if kind == "load hook" else 1)
    assert same(saved["state"], optimizer.state_dict()["state"])
    assert read.groups == []


def test_bf16_parameters_keep_their_fp32_state_by_name():
    """State is stored and put back in its own dtype, whatever the parameter's."""
    model = nn.Linear(3, 1).to(torch.bfloat16)
    optimizer = optim.AdamW(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": torch.randn(parameter.shape)}
    saved = round_trip({"model": model, "o": optimizer})["o"]
    fresh = optim.AdamW(model.parameters())
    put_back(model, fresh, saved)
    assert same(list(fresh.state.values()), list(optimizer.state.values()))


@pytest.mark.parametrize("flag", ["capturable", "fused"])
def test_step_lives_where_torch_has_it(flag: str):
    """``step`` is on the CPU unless the group is capturable or fused; all else is beside its parameter."""
    param = torch.empty(1, device="meta")
    assert state_device(param, {flag: False}, "step").type == "cpu"
    assert state_device(param, {flag: None}, "step").type == "cpu"
    assert state_device(param, {flag: True}, "step").type == "meta"
    assert state_device(param, {flag: False}, "exp_avg").type == "meta"


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_a_zero_redundancy_optimizer_is_refused_by_name(process_group: None):
    """Its state lies on many ranks, and its ``state_dict()`` needs a collective."""
    model = nn.Linear(1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.distributed.optim scripts functions when it is imported
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=optim.SGD, lr=0.1)
    with pytest.raises(UnsupportedValueError, match="ZeroRedundancyOptimizer") as caught:
        collect({"m": model, "o": optimizer})
    assert caught.value.key == "o"
