"""Optimizers: by parameter name, group by group, and those that load themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

from aiockpt.errors import StateMismatchError
from tests.restoring.restoring import fingerprint, restore
from tests.restoring.writing import write_step


def layers(seed: int = 0, count: int = 3) -> nn.ModuleList:
    torch.manual_seed(seed)
    return nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(count))


def stepped(optimizer: optim.Optimizer, model: nn.ModuleList) -> optim.Optimizer:
    for index, layer in enumerate(model):
        layer(torch.full((2,), index + 1.0)).sum().backward()
    optimizer.step()
    return optimizer


def weights(model: nn.ModuleList) -> list[nn.Parameter]:
    return [layer.weight for layer in model]


def test_another_grouping_gets_each_parameters_hyperparameters(tmp_path: Path):
    """Groups of the live optimizer take those of the saved group that their parameters were in."""
    saved, live = layers(), layers(1)
    w = weights(saved)
    optimizer = stepped(optim.AdamW([{"params": w[:2], "lr": 0.5, "tag": "a"}, {"params": w[2:], "lr": 0.25}]), saved)
    write_step(tmp_path, 1, {"model": saved, "optimizer": optimizer})
    v = weights(live)
    other = optim.AdamW([{"params": [v[2]]}, {"params": [v[1]]}, {"params": [v[0]]}], eps=1e-3)
    restore(tmp_path, {"model": live, "optimizer": other})
    assert [group["lr"] for group in other.param_groups] == [0.25, 0.5, 0.5]
    assert [group.get("tag") for group in other.param_groups] == [None, "a", "a"]
    assert [group["eps"] for group in other.param_groups] == [1e-8] * 3
    for mine, theirs in zip(v, w, strict=True):
        assert torch.equal(other.state[mine]["exp_avg"], optimizer.state[theirs]["exp_avg"])


def test_a_group_cannot_have_two_learning_rates(tmp_path: Path):
    """Saved groups that differ do not fit into one; equal ones do."""
    saved, live = layers(), layers(1)
    w = weights(saved)
    write_step(
        tmp_path, 1, {"model": saved, "o": optim.SGD([{"params": w[:1], "lr": 0.5}, {"params": w[1:], "lr": 0.1}])}
    )
    state = {"model": live, "o": optim.SGD(live.parameters(), lr=1.0)}
    before = fingerprint(state)
    with pytest.raises(StateMismatchError, match="groups 0, 1 of the checkpoint, which differ in lr"):
        restore(tmp_path, state)
    assert fingerprint(state) == before
    write_step(
        tmp_path, 2, {"model": saved, "o": optim.SGD([{"params": w[:1], "lr": 0.5}, {"params": w[1:], "lr": 0.5}])}
    )
    restore(tmp_path, state)
    assert state["o"].param_groups[0]["lr"] == 0.5


def test_parameters_on_one_side_alone_are_listed(tmp_path: Path):
    """By name; with strict=False the common ones are restored."""
    saved, live = layers(), layers(1)
    w, v = weights(saved), weights(live)
    optimizer = stepped(optim.AdamW(w[:2], lr=0.5), saved)
    write_step(tmp_path, 1, {"model": saved, "optimizer": optimizer})
    other = stepped(optim.AdamW(v[1:]), live)
    mine = other.state[v[2]]["exp_avg"].clone()
    with pytest.raises(StateMismatchError) as caught:
        restore(tmp_path, {"model": live, "optimizer": other})
    assert caught.value.missing == ("optimizer.state.model.2.weight",)
    assert caught.value.unexpected == ("optimizer.state.model.0.weight",)
    restore(tmp_path, {"model": live, "optimizer": other}, strict=False)
    assert torch.equal(other.state[v[1]]["exp_avg"], optimizer.state[w[1]]["exp_avg"])
    assert torch.equal(other.state[v[2]]["exp_avg"], mine)
    assert other.param_groups[0]["lr"] == 0.5


def test_a_whole_optimizer_is_missing_or_unexpected(tmp_path: Path):
    """Every part by name."""
    model = layers(count=1)
    optimizer = stepped(optim.SGD(model.parameters(), momentum=0.9), model)
    write_step(tmp_path, 1, {"model": model, "optimizer": optimizer})
    with pytest.raises(StateMismatchError) as caught:
        restore(tmp_path, {"model": model, "other": optimizer})
    assert caught.value.missing == ("other.state.model.0.weight", "other.param_groups")
    assert caught.value.unexpected == ("optimizer.state.model.0.weight.momentum_buffer", "optimizer.param_groups")


def test_state_of_a_parameter_with_another_shape_does_not_fit(tmp_path: Path):
    """Also where the model is left out, and where the live optimizer has no state yet."""
    saved, live = nn.Linear(2, 2), nn.Linear(2, 3)
    optimizer = optim.AdamW(saved.parameters())
    saved(torch.ones(2)).sum().backward()
    optimizer.step()
    write_step(tmp_path, 1, {"model": saved, "optimizer": optimizer})
    fresh = optim.AdamW(live.parameters())
    for _ in range(2):
        with pytest.raises(StateMismatchError) as caught:
            restore(tmp_path, {"model": live, "optimizer": fresh}, include="optimizer")
        names = [line.split(":")[0] for line in caught.value.mismatched or ()]
        assert "optimizer.state.model.weight.exp_avg" in names
        assert "optimizer.state.model.weight.step" not in names
        live(torch.ones(2)).sum().backward()
        fresh.step()


def test_a_tensor_learning_rate_stays_a_tensor(tmp_path: Path):
    """The live kind stands: a number is filled in; a saved tensor replaces a number."""
    saved, live = layers(count=1), layers(1, count=1)
    tensor, number = torch.tensor(0.5), 0.25
    write_step(tmp_path, 1, {"m": saved, "o": optim.AdamW(saved.parameters(), lr=number)})
    mine = optim.AdamW(live.parameters(), lr=torch.tensor(1.0))
    rate = mine.param_groups[0]["lr"]
    restore(tmp_path, {"m": live, "o": mine})
    assert mine.param_groups[0]["lr"] is rate
    assert rate.item() == number
    write_step(tmp_path, 2, {"m": saved, "o": optim.AdamW(saved.parameters(), lr=tensor)})
    mine.param_groups[0]["lr"] = 1.0
    restore(tmp_path, {"m": live, "o": mine})
    assert torch.equal(mine.param_groups[0]["lr"], tensor)
    assert mine.param_groups[0]["lr"] is not tensor


def test_two_live_groups_do_not_share_what_they_got(tmp_path: Path):
    """A list among the hyperparameters is each group's own, as is a tensor."""
    saved, live = layers(), layers(1)
    optimizer = optim.SGD(saved.parameters(), lr=0.1)
    optimizer.param_groups[0] |= {"schedule": [1, 2], "scale": torch.ones(2)}
    write_step(tmp_path, 1, {"m": saved, "o": optimizer})
    other = optim.SGD([{"params": [w]} for w in weights(live)], lr=1.0)
    restore(tmp_path, {"m": live, "o": other})
    first, second, _ = other.param_groups
    assert first["schedule"] == second["schedule"] == [1, 2]
    assert first["schedule"] is not second["schedule"]
    assert first["scale"].tolist() == [1, 1]
    assert first["scale"].data_ptr() != second["scale"].data_ptr()


def test_names_that_the_optimizer_was_built_with_stay_the_live_ones(tmp_path: Path):
    """torch pairs param_names with params by position."""
    saved, live = layers(count=2), layers(1, count=2)
    write_step(tmp_path, 1, {"m": saved, "o": optim.SGD(saved.named_parameters(), lr=0.5)})
    other = optim.SGD(list(live.named_parameters())[::-1], lr=0.1)
    restore(tmp_path, {"m": live, "o": other})
    assert other.param_groups[0]["param_names"] == ["1.weight", "0.weight"]
    assert other.param_groups[0]["lr"] == 0.5


class Odd(optim.Optimizer):
    """Keeps lists, tuples, text and state under keys that are no parameters."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def fill(self, x: float) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] = {
                    "list": [torch.full((2,), x), None, torch.full((1,), x)],
                    "pair": (torch.full((2, 2), x), x),
                    7: "text",
                    "factor": torch.full((2, 1), x),
                    "empty": torch.zeros(0),
                }
        self.state["shared"] = {"count": int(x), "mean": torch.full((3,), x)}  # type: ignore[index]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""


@pytest.mark.parametrize("existing", [True, False])
def test_unusual_state_goes_back(existing: bool, tmp_path: Path):
    """Lists, tuples, other keys, shapes that are not the parameter's, shared state; what is left over goes."""
    saved, live = layers(), layers(1)
    optimizer, other = Odd(saved.parameters()), Odd(live.parameters())
    optimizer.fill(3.0)
    if existing:
        other.fill(1.0)
        other.state[weights(live)[0]]["extra"] = 1
        other.state["more"] = {"x": 1}  # type: ignore[index]
    write_step(tmp_path, 1, {"m": saved, "o": optimizer})
    restore(tmp_path, {"m": live, "o": other})
    for mine, theirs in zip(weights(live), weights(saved), strict=True):
        assert repr(other.state[mine]) == repr(optimizer.state[theirs])
    assert repr(other.state["shared"]) == repr(optimizer.state["shared"])  # type: ignore[index]
    assert len(other.state) == len(optimizer.state)


class Casting(optim.AdamW):
    """Overrides load_state_dict, as many third-party optimizers do."""

    calls = 0

    def load_state_dict(self, state_dict: Any) -> None:
        self.calls += 1
        super().load_state_dict(state_dict)


@pytest.mark.parametrize("hooked", [True, False])
def test_optimizers_that_load_themselves_do_so_and_keep_the_dtype(hooked: bool, tmp_path: Path):
    """By override or by hook: torch's own cast of fp32 state to bf16 is undone."""
    kind = optim.AdamW if hooked else Casting

    def make(seed: int) -> tuple[nn.Module, optim.Optimizer, list[int]]:
        torch.manual_seed(seed)
        model = nn.Linear(2, 2).bfloat16()
        optimizer = kind(model.parameters(), lr=0.1 + seed)
        calls: list[int] = []
        if hooked:
            optimizer.register_load_state_dict_post_hook(lambda _: calls.append(1))
        for param in model.parameters():
            optimizer.state[param] = {"step": torch.tensor(1.0), "exp_avg": torch.rand(param.shape)}
        return model, optimizer, calls

    saved, optimizer, _ = make(0)
    live, other, calls = make(1)
    write_step(tmp_path, 1, {"m": saved, "o": optimizer})
    restore(tmp_path, {"m": live, "o": other})
    assert len(calls) + getattr(other, "calls", 0) == 1
    assert other.param_groups[0]["lr"] == 0.1
    for mine, theirs in zip(live.parameters(), saved.parameters(), strict=True):
        assert other.state[mine]["exp_avg"].dtype is torch.float32
        assert torch.equal(other.state[mine]["exp_avg"], optimizer.state[theirs]["exp_avg"])


def test_without_a_module_parameters_go_by_group_and_index(tmp_path: Path):
    """Where no parameter has a name."""
    saved, live = layers(), layers(1)
    optimizer, other = stepped(optim.AdamW(saved.parameters()), saved), optim.AdamW(live.parameters())
    write_step(tmp_path, 1, {"o": optimizer})
    restore(tmp_path, {"o": other})
    for mine, theirs in zip(weights(live), weights(saved), strict=True):
        assert torch.equal(other.state[mine]["exp_avg"], optimizer.state[theirs]["exp_avg"])


def test_one_optimizer_over_two_modules_with_equal_names(tmp_path: Path):
    """The module's place in the state is part of the name; the places may change sides in the optimizer."""
    a, b = layers(count=1), layers(1, count=1)
    optimizer = optim.AdamW([*a.parameters(), *b.parameters()])
    stepped(optimizer, nn.ModuleList([a[0], b[0]]))
    write_step(tmp_path, 1, {"a": a, "b": b, "o": optimizer})
    c, d = layers(2, count=1), layers(3, count=1)
    other = optim.AdamW([*d.parameters(), *c.parameters()])
    restore(tmp_path, {"a": c, "b": d, "o": other})
    assert torch.equal(other.state[c[0].weight]["exp_avg"], optimizer.state[a[0].weight]["exp_avg"])
    assert torch.equal(other.state[d[0].weight]["exp_avg"], optimizer.state[b[0].weight]["exp_avg"])


def test_new_state_has_the_strides_of_its_parameter(tmp_path: Path):
    """As zeros_like makes it: channels_last parameters have channels_last state."""
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = optim.AdamW(model.parameters())
    model(torch.ones(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    write_step(tmp_path, 1, {"m": model, "o": optimizer})
    live = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fresh = optim.AdamW(live.parameters())
    restore(tmp_path, {"m": live, "o": fresh})
    found = fresh.state[live.weight]["exp_avg"]
    assert found.stride() == live.weight.stride() == model.weight.stride()
    assert torch.equal(found, optimizer.state[model.weight]["exp_avg"])
    assert torch.equal(live.weight, model.weight)
