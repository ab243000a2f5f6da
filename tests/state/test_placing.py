"""What is declared of a state's tensors by its owner: each rank's own, or the same on all."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import aiockpt
from aiockpt.errors import ConfigError, UnsupportedValueError
from aiockpt.format.names import dotted
from aiockpt.planning.placings import PER_RANK, UNDECLARED, Placing, replicated
from aiockpt.state.collect import collect
from aiockpt.state.expected import expected_entries
from aiockpt.state.ranks import ALONE, Ranks
from tests.restoring.restoring import restore
from tests.restoring.writing import write_step
from tests.state.rebuild import round_trip, same

SECOND = Ranks(1, 4, (0, 1, 2, 3))


def placings(state: Any, **options: Any) -> dict[str, Placing]:
    """Return the placing of every tensor by its dotted name."""
    return {dotted(entry.segments): entry.placing for entry in collect(state, **options).entries}


class Loader:
    """Saves and loads its own state."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.buffer = torch.full((3,), float(position))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "buffer": self.buffer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.buffer = state["position"], state["buffer"]


# ---- PerRank


@pytest.mark.parametrize("ranks", [ALONE, SECOND])
def test_what_is_of_each_rank_is_marked_in_the_tree(ranks: Ranks) -> None:
    """A value, a tensor, a container, an object; a mark inside of a mark says nothing more."""
    state = {
        "value": aiockpt.PerRank(5),
        "tensor": aiockpt.PerRank(torch.ones(2)),
        "dict": aiockpt.PerRank({"a": torch.ones(3), "b": 1, "rng": aiockpt.PerRank(2)}),
        "list": [aiockpt.PerRank(1), 2],
        "loader": aiockpt.PerRank(Loader(3)),
        "array": aiockpt.PerRank(np.arange(3)),
        "common": torch.ones(4),
    }
    collected = collect(state, ranks=ranks)
    assert collected.tree == {
        "value": ["per_rank", -1],
        "tensor": ["per_rank", 0],
        "dict": ["per_rank", {"a": 1, "b": -2, "rng": -3}],
        "list": ["list", [["per_rank", -4], -5]],
        "loader": ["per_rank", {"position": -6, "buffer": 2}],
        "array": ["per_rank", ["ndarray", 3, "<i8"]],
        "common": 4,
    }
    assert [entry.placing for entry in collected.entries] == [PER_RANK] * 4 + [UNDECLARED]


def test_modules_and_optimizers_may_be_of_each_rank() -> None:
    """Also where the optimizer comes before its module."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).backward()
    optimizer.step()
    found = placings(
        {"own": aiockpt.PerRank({"optimizer": optimizer, "model": model}), "w": torch.ones(1)}, ranks=SECOND
    )
    assert len(found) == 9
    assert {name for name, placing in found.items() if placing != PER_RANK} == {"w"}


def test_generators_are_of_each_rank_without_a_mark() -> None:
    for state in ({"rng": aiockpt.RNG()}, {"rng": aiockpt.PerRank(aiockpt.RNG())}):
        collected = collect(state, ranks=SECOND)
        assert collected.tree["rng"][0] == "per_rank"
        assert not isinstance(collected.tree["rng"][1], list)
        assert {entry.placing for entry in collected.entries} == {PER_RANK}
    lone = collect({"all": [aiockpt.RNG(), 1]}).tree["all"]
    assert lone[1][0][0] == "per_rank"


def test_what_an_object_returns_holds_no_mark() -> None:
    """It would get something else back than it gave."""
    loader = Loader(1)
    loader.position = aiockpt.PerRank(1)  # type: ignore[assignment]
    with pytest.raises(UnsupportedValueError, match=r"loader\.position"):
        round_trip({"loader": loader})


def test_memory_in_both_is_two_entries() -> None:
    tensor = torch.ones(2)
    found = placings({"x": {"a": tensor, "b": aiockpt.PerRank(tensor), "c": tensor}}, ranks=SECOND)
    assert found == {"x.a": UNDECLARED, "x.b": PER_RANK}


def test_a_mark_is_a_value() -> None:
    """Frozen, equal to itself alone, and it can be copied and pickled."""
    mark = aiockpt.PerRank([1])
    with pytest.raises(AttributeError):
        mark.value = 2  # type: ignore[misc]
    assert mark != aiockpt.PerRank([1])
    assert copy.deepcopy(mark).value == pickle.loads(pickle.dumps(mark)).value == [1]
    assert "[1]" in repr(mark)


def test_a_job_of_one_rank_restores_its_own(tmp_path: Path) -> None:
    """In place where there is something to write into; a plain value comes in another mark."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).backward()
    optimizer.step()
    saved: dict[str, Any] = {
        "value": aiockpt.PerRank(5),
        "tuple": (1, aiockpt.PerRank(6)),
        "inner": aiockpt.PerRank((1, torch.ones(2), "a")),
        "tensor": aiockpt.PerRank(torch.ones(2)),
        "dict": aiockpt.PerRank({"a": torch.ones(3), "b": [1, 2]}),
        "list": [aiockpt.PerRank([1]), torch.ones(1)],
        "loader": aiockpt.PerRank(Loader(3)),
        "array": aiockpt.PerRank(np.arange(3)),
        "model": aiockpt.PerRank(model),
        "optimizer": optimizer,
        "rng": aiockpt.RNG(),
    }
    write_step(tmp_path, 1, saved)
    fresh = nn.Linear(2, 1)
    live: dict[str, Any] = {
        "value": aiockpt.PerRank(0),
        "tuple": (0, aiockpt.PerRank(0)),
        "inner": aiockpt.PerRank((0, torch.zeros(2), "")),
        "tensor": aiockpt.PerRank(torch.zeros(2)),
        "dict": aiockpt.PerRank({"a": torch.zeros(3), "b": 0}),
        "list": [aiockpt.PerRank(None), torch.zeros(1)],
        "loader": aiockpt.PerRank(Loader(0)),
        "array": aiockpt.PerRank(np.zeros(3, dtype=np.int64)),
        "model": aiockpt.PerRank(fresh),
        "optimizer": torch.optim.AdamW(fresh.parameters()),
        "rng": aiockpt.RNG(),
    }
    before = dict(live)
    restore(tmp_path, live)
    assert live["value"].value == 5
    assert live["tuple"][0] == 1
    assert live["tuple"][1].value == 6
    assert same(live["inner"].value, saved["inner"].value)
    assert live["inner"].value[1] is before["inner"].value[1]
    for key in ("tensor", "dict", "loader", "array", "model"):
        assert live[key] is before[key], key
    assert same(live["tensor"].value, torch.ones(2))
    assert same(live["dict"].value, {"a": torch.ones(3), "b": [1, 2]})
    assert live["list"][0].value == [1]
    assert live["loader"].value.position == 3
    assert same(live["array"].value, np.arange(3))
    assert torch.equal(fresh.weight, model.weight)
    assert live["optimizer"].state[fresh.weight]["step"] == 1


# ---- names that are declared to be the same


def test_plain_tensors_that_a_name_fits_are_the_same_on_all_ranks() -> None:
    """What is of each rank stays so."""
    state = {
        "model": nn.Linear(2, 1),
        "own": aiockpt.PerRank(torch.ones(1)),
        "x": {"a": torch.ones(1), "b": torch.ones(1)},
    }
    everywhere = replicated(4)
    found = placings(state, ranks=SECOND, replicated=["model", "*.a", "own"])
    assert found == {
        "model.weight": everywhere,
        "model.bias": everywhere,
        "own": PER_RANK,
        "x.a": everywhere,
        "x.b": UNDECLARED,
    }
    entries = collect(state, ranks=SECOND, replicated=["model", "*.a", "own"]).entries
    assert len({id(entry.placing) for entry in entries if entry.placing == everywhere}) == 1
    assert placings(state, replicated="model.*")["model.weight"] is UNDECLARED


@pytest.mark.parametrize("ranks", [ALONE, SECOND])
def test_a_pattern_that_fits_nothing_is_refused(ranks: Ranks) -> None:
    """At each call, whatever was met before."""
    state = {"model": nn.Linear(2, 1), "epoch": 1}
    collect(state, ranks=ranks, replicated=["model.weight", "epoch"])
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"nothing is named 'modle\.\*'") as caught:
            collect(state, ranks=ranks, replicated=["model.*", "modle.*"])
    assert caught.value.argument == "replicated"
    assert "model.weight" in str(caught.value.next)
    with pytest.raises(ConfigError, match="no tensors"):
        collect({}, ranks=ranks, replicated=["x"])
    with pytest.raises(ConfigError, match="is no pattern"):
        collect(state, ranks=ranks, replicated=[""])


def test_state_that_an_optimizer_will_have_has_its_name_already() -> None:
    """And its placing, where memory is made for it."""
    model = nn.Linear(2, 1)
    state = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    collected = collect(state, ranks=SECOND, replicated=["optimizer.state.*exp_avg*"])
    expected = {dotted(entry.segments): entry for entry in expected_entries(collected)}
    model(torch.ones(2)).backward()
    state["optimizer"].step()  # type: ignore[attr-defined]
    actual = collect(state, ranks=SECOND, replicated=["optimizer.state.*exp_avg*"]).entries
    assert set(expected.values()) == {entry for entry in actual if entry.segments[0] == "optimizer"}
    assert expected["optimizer.state.model.weight.exp_avg"].placing == replicated(4)
    assert expected["optimizer.state.model.weight.step"].placing is UNDECLARED
