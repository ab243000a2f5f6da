"""What does not fit is said in one error, before anything live changes."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

from aiockpt.errors import ConfigError, StateMismatchError, UnsupportedValueError
from aiockpt.restoring.targets import read_targets
from tests.restoring.restoring import fingerprint, restore
from tests.restoring.writing import write_step


def training(width: int = 4, *, seed: int = 0, bias: bool = True) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(OrderedDict(a=nn.Linear(3, width, bias=bias), b=nn.Linear(width, 1)))
    optimizer = optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "progress": {"epoch": seed}}


def test_all_that_does_not_fit_is_listed_at_once_and_nothing_changes(tmp_path: Path):
    """Missing, unexpected, other shape and other dtype: one error with everything in its fields."""
    saved = training() | {"gone": torch.ones(2), "ema": {"a": torch.ones(3)}, "kind": torch.ones(1)}
    write_step(tmp_path, 7, saved)
    live = training(5, seed=1) | {
        "new": torch.zeros(2),
        "ema": {"a": torch.zeros(3, dtype=torch.float64), "b": torch.zeros(1)},
        "kind": {"x": 1},
    }
    before = fingerprint(live)
    with pytest.raises(StateMismatchError) as caught:
        restore(tmp_path, live)
    error = caught.value
    assert error.step == 7
    assert error.missing == ("new", "ema.b")
    assert error.unexpected == ("gone",)
    names = [line.split(":")[0] for line in error.mismatched or ()]
    assert {"model.a.weight", "model.a.bias", "model.b.weight", "ema.a", "kind"} <= set(names)
    assert "optimizer.state.model.a.weight.exp_avg" in names
    assert "ema.a: float32 [3] in the checkpoint, float64 [3] in the state" in (error.mismatched or ())
    for word in ("2 missing", "1 unexpected", "new", "gone", "[4, 3]", "[5, 3]"):
        assert word in str(error)
    assert "strict=False" in error.next
    assert fingerprint(live) == before


def test_what_fits_is_taken_when_not_strict(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The rest is named: missing, unexpected, and of another shape in both; and warned of."""
    saved = {"same": torch.ones(2), "shape": torch.ones(3), "gone": torch.ones(1), "value": 5}
    write_step(tmp_path, 1, saved, metadata=["m"])
    live = {"same": torch.zeros(2), "shape": torch.zeros(4), "new": torch.zeros(1), "value": 0}
    outcome = restore(tmp_path, live, strict=False)
    assert outcome is not None
    assert (outcome.missing, outcome.unexpected) == (("new", "shape"), ("gone", "shape"))
    assert outcome.metadata == ["m"]
    assert live["same"].tolist() == [1, 1]
    assert live["shape"].tolist() == [0, 0, 0, 0]
    assert live["value"] == 5
    assert "shape: float32 [3] in the checkpoint" in caplog.text


def test_a_long_list_is_cut_in_the_text_and_whole_in_the_fields(tmp_path: Path):
    """Twenty names of a kind are enough for people."""
    write_step(tmp_path, 1, {f"key{i:03}": i for i in range(300)})
    with pytest.raises(StateMismatchError) as caught:
        restore(tmp_path, {})
    assert len(caught.value.unexpected or ()) == 300
    assert "and 280 more" in str(caught.value)


@pytest.mark.parametrize(
    ("saved", "live", "word"),
    [
        ({"x": 1}, {"x": torch.zeros(1)}, "a value in the checkpoint, a tensor in the state"),
        ({"x": torch.zeros(1)}, {"x": nn.Linear(1, 1)}, "a tensor in the checkpoint, a module in the state"),
        ({"x": nn.Linear(1, 1)}, {"x": None}, "a module in the checkpoint, NoneType in the state"),
        ({"x": 1}, {"x": {"y": 1}}, "a value in the checkpoint, a dict in the state"),
        ({"x": 1}, {"x": [torch.zeros(1)]}, "a value in the checkpoint, a list in the state"),
        ({"x": (torch.ones(1),)}, {"x": [torch.zeros(1)]}, "a tuple in the checkpoint, a list in the state"),
        ({"x": {"a": 1}}, {"x": optim.SGD([torch.zeros(1)])}, "no optimizer by parameter names"),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(1).expand(2)}, "expanded"),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(2, device="meta")}, "meta"),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(2).to_sparse()}, "torch.sparse_coo"),
        ({"x": np.zeros(2)}, {"x": torch.zeros(2, dtype=torch.float64)}, "a numpy array in the checkpoint"),
    ],
)
def test_another_kind_of_thing_does_not_fit(saved: Any, live: Any, word: str, tmp_path: Path):
    """What stands there and what should stand there are said."""
    write_step(tmp_path, 1, saved)
    with pytest.raises(StateMismatchError) as caught:
        restore(tmp_path, live)
    assert len(caught.value.mismatched or ()) == 1
    assert word in str(caught.value)


def test_a_mapping_that_takes_nothing_is_found_beforehand(tmp_path: Path):
    """A read-only mapping may hold tensors, and no values that change."""
    write_step(tmp_path, 1, {"t": torch.ones(1), "v": 1})
    live = MappingProxyType({"t": torch.zeros(1), "v": 0})
    with pytest.raises(StateMismatchError, match="mappingproxy, which takes no new values"):
        restore(tmp_path, live)
    assert live["t"].item() == 0
    restore(tmp_path, live, exclude="v")
    assert live["t"].item() == 1


def test_include_and_exclude_choose_by_name(tmp_path: Path):
    """What is not chosen is neither restored nor missing nor unexpected."""
    saved = training() | {"extra": 1}
    write_step(tmp_path, 1, saved)
    live = training(seed=1) | {"other": 2}
    theirs, mine = saved["model"], live["model"]
    state, saved_state = live["optimizer"].state, saved["optimizer"].state
    state[mine.b.bias]["exp_avg"].fill_(77)
    restore(tmp_path, live, include="model.a")
    assert torch.equal(mine.a.weight, theirs.a.weight)
    assert not torch.equal(mine.b.weight, theirs.b.weight)
    restore(tmp_path, live, include=["model.*", "optimizer"], exclude=["*.b.bias"])
    assert torch.equal(mine.b.weight, theirs.b.weight)
    assert not torch.equal(mine.b.bias, theirs.b.bias)
    assert torch.equal(state[mine.a.weight]["exp_avg"], saved_state[theirs.a.weight]["exp_avg"])
    assert state[mine.b.bias]["exp_avg"].item() == 77
    assert live["progress"] == {"epoch": 1}
    assert live["other"] == 2
    with pytest.raises(StateMismatchError) as caught:
        restore(tmp_path, live, exclude="model")
    assert (caught.value.missing, caught.value.unexpected) == (("other",), ("extra",))


def test_an_include_that_fits_nothing_is_refused(tmp_path: Path):
    """A misspelt pattern would restore nothing."""
    write_step(tmp_path, 1, training())
    with pytest.raises(ConfigError, match=r"modle\.\*") as caught:
        restore(tmp_path, training(), include=["modle.*", "optimizer"])
    assert caught.value.argument == "include"
    assert "model.a.weight" in caught.value.next


def test_names_with_dots_slashes_and_unicode_meet(tmp_path: Path):
    """Names are lists of segments; keys of other types are no text that looks alike."""

    def state(x: float) -> dict[Any, Any]:
        return {
            "a.b": torch.full((1,), x),
            "a/b": {"ü ñ": torch.full((1,), x)},
            1: x,
            "1": x + 1,
            (1, "x"): {None: x},
            "": x,
            "\ud800": x,
        }

    write_step(tmp_path, 1, state(5.0))
    live = state(0.0)
    restore(tmp_path, live)
    assert repr(live) == repr(state(5.0))


@pytest.mark.parametrize("state", [[1], nn.Linear(1, 1), None])
def test_a_state_is_a_mapping(state: Any):
    """A module alone has no name."""
    with pytest.raises(UnsupportedValueError, match="a state is a mapping"):
        read_targets(state)


def test_a_state_that_holds_itself_is_refused():
    """Not followed for ever."""
    state: dict[str, Any] = {}
    state["x"] = state
    with pytest.raises(UnsupportedValueError, match="nested deeper"):
        read_targets(state)
