"""Modules: wrappers, tied weights, hooks, extra state, loading of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from aiockpt.errors import StateMismatchError
from tests.restoring.restoring import fingerprint, restore
from tests.restoring.writing import write_step


class Tied(nn.Module):
    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


@pytest.mark.parametrize("tied_live", [True, False])
def test_tied_weights_load_under_both_names(tied_live: bool, tmp_path: Path):
    """Stored once; the live ones may be tied or not."""
    saved, live = Tied(), Tied(tied=tied_live)
    write_step(tmp_path, 1, {"model": saved})
    restore(tmp_path, {"model": live})
    assert torch.equal(live.embedding.weight, saved.embedding.weight)
    assert torch.equal(live.head.weight, saved.embedding.weight)
    assert (live.head.weight is live.embedding.weight) == tied_live


def test_of_two_saved_weights_for_one_live_one_the_later_name_counts(tmp_path: Path):
    """As with load_state_dict; never a mixture of both."""
    saved, live = Tied(tied=False), Tied()
    write_step(tmp_path, 1, {"model": saved})
    restore(tmp_path, {"model": live})
    assert torch.equal(live.embedding.weight, saved.head.weight)


@pytest.mark.parametrize("kept", ["embedding.weight", "head.weight"])
def test_a_tied_weight_may_be_saved_under_one_of_its_names(kept: str, tmp_path: Path):
    """As in files of others, which leave the second name out; what is not tied is still missing."""
    saved, live = Tied(), Tied()
    write_step(tmp_path, 1, {"model": {kept: saved.embedding.weight}})
    restore(tmp_path, {"model": live})
    assert torch.equal(live.head.weight, saved.embedding.weight)
    assert live.head.weight is live.embedding.weight
    untied = Tied(tied=False)
    before = fingerprint({"model": untied})
    with pytest.raises(StateMismatchError) as caught:
        restore(tmp_path, {"model": untied})
    assert caught.value.missing == tuple(f"model.{name}" for name in untied.state_dict() if name != kept)
    assert fingerprint({"model": untied}) == before


def test_a_tied_weight_that_is_left_out_is_missing_under_its_other_name(tmp_path: Path):
    """Nothing of it is read, so nothing makes up for it."""
    write_step(tmp_path, 1, {"model": {"embedding.weight": Tied().embedding.weight}})
    with pytest.raises(StateMismatchError) as caught:
        restore(tmp_path, {"model": Tied()}, exclude="model.embedding")
    assert caught.value.missing == ("model.head.weight",)


def test_wrappers_on_either_side_do_not_matter(tmp_path: Path):
    """Compiled outside, compiled inside, or plain."""
    saved, live, inside = (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(3))
    write_step(tmp_path, 1, {"model": torch.compile(saved, backend="eager")})
    restore(tmp_path, {"model": live})
    inside[0] = torch.compile(inside[0], backend="eager")
    write_step(tmp_path, 2, {"model": live})
    restore(tmp_path, {"model": inside})
    for model in (live, inside):
        assert fingerprint({"m": model})[0] == fingerprint({"m": saved})[0]


class WithExtra(nn.Module):
    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("extra", [{"scale": 3, "history": [torch.ones(2)]}, torch.arange(3), {1, 2}], ids=str)
def test_extra_state_is_set(extra: Any, tmp_path: Path):
    """Values, tensors of another shape, or both; parameters beside it are still overwritten in place."""
    saved = nn.Sequential(WithExtra(extra), nn.Linear(2, 2))
    live = nn.Sequential(WithExtra(torch.zeros(9)), nn.Linear(2, 2))
    weight, address = live[0].layer.weight, live[0].layer.weight.data_ptr()
    write_step(tmp_path, 1, {"model": saved})
    restore(tmp_path, {"model": live})
    assert repr(live[0].extra) == repr(extra)
    assert live[0].layer.weight is weight
    assert weight.data_ptr() == address
    assert torch.equal(weight, saved[0].layer.weight)
    with pytest.raises(StateMismatchError, match=r"model\.0\._extra_state"):
        restore(tmp_path, {"model": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})


class Versioned(nn.Module):
    """Version 2 renamed ``old`` to ``new`` and doubled it."""

    _version = 2

    def __init__(self, name: str = "new") -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.ones(2)))

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any, **options: Any
    ) -> None:
        if local_metadata.get("version", 1) < 2:
            state_dict[prefix + "new"] = state_dict.pop(prefix + "old") * 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest, **options)


class OldVersion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.old = nn.Parameter(torch.full((2,), 5.0))


def test_a_module_converts_what_older_code_saved(tmp_path: Path):
    """By its own loading, with the version that was saved; other modules beside it load as ever."""
    write_step(tmp_path, 1, {"model": nn.Sequential(OldVersion(), nn.Linear(2, 2))})
    live = nn.Sequential(Versioned(), nn.Linear(2, 2))
    restore(tmp_path, {"model": live})
    assert live[0].new.tolist() == [10, 10]
    write_step(tmp_path, 2, {"model": live})
    again = nn.Sequential(Versioned(), nn.Linear(2, 2))
    restore(tmp_path, {"model": again})
    assert again[0].new.tolist() == [10, 10]


def test_a_hook_may_rename_keys(tmp_path: Path):
    """Names that such a module lacks are for its hook to judge."""
    saved, live = nn.Linear(2, 2), nn.Linear(2, 2)
    write_step(tmp_path, 1, {"model": nn.ModuleDict({"before": saved})})

    def rename(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for key in list(state):
            if key.startswith(f"{prefix}before."):
                state[key.replace("before.", "after.")] = state.pop(key)

    model = nn.ModuleDict({"after": live})
    model.register_load_state_dict_pre_hook(rename)
    restore(tmp_path, {"model": model})
    assert torch.equal(live.weight, saved.weight)


def test_what_a_module_refuses_by_itself_says_that_the_state_is_mixed(tmp_path: Path):
    """Nobody can ask its code beforehand."""
    write_step(tmp_path, 1, {"model": nn.ModuleDict({"other": nn.Linear(2, 2)}), "x": torch.ones(1)})
    model = nn.ModuleDict({"mine": nn.Linear(2, 2)})
    model.register_load_state_dict_pre_hook(lambda *_: None)
    with pytest.raises(StateMismatchError, match="do not train on it") as caught:
        restore(tmp_path, {"model": model, "x": torch.zeros(1)})
    assert "mine.weight" in str(caught.value)
    outcome = restore(tmp_path, {"model": model, "x": torch.zeros(1)}, strict=False)
    assert outcome is not None
    assert set(outcome.missing) == {"model.mine.weight", "model.mine.bias"}
    assert set(outcome.unexpected) == {"model.other.weight", "model.other.bias"}


def test_a_mismatch_beside_a_module_with_hooks_is_found_beforehand(tmp_path: Path):
    """Only names below such a module wait for its code."""
    write_step(tmp_path, 1, {"model": nn.Sequential(Versioned(), nn.Linear(2, 2))})
    live = nn.Sequential(Versioned(), nn.Linear(2, 3))
    before = fingerprint({"model": live})
    with pytest.raises(StateMismatchError) as caught:
        restore(tmp_path, {"model": live})
    assert {line.split(":")[0] for line in caught.value.mismatched or ()} == {"model.1.weight", "model.1.bias"}
    assert fingerprint({"model": live}) == before


def test_an_own_load_state_dict_gets_everything(tmp_path: Path):
    """With all items fresh, under the live names."""

    class Own(nn.Linear):
        seen: Any = None

        def load_state_dict(self, state: Any, *args: Any, **options: Any) -> Any:
            self.seen = dict(state)
            return super().load_state_dict(state, *args, **options)

    saved, live = Own(2, 2), Own(2, 2)
    write_step(tmp_path, 1, {"model": saved})
    restore(tmp_path, {"model": live})
    assert sorted(live.seen) == ["bias", "weight"]
    assert live.seen["weight"] is not live.weight
    assert torch.equal(live.weight, saved.weight)


def test_a_module_loads_from_a_saved_state_dict_and_the_other_way_round(tmp_path: Path):
    """A mapping of the same names is as good."""
    saved, live = nn.Linear(2, 2), nn.Linear(2, 2)
    write_step(tmp_path, 1, {"model": saved.state_dict()})
    restore(tmp_path, {"model": live})
    assert torch.equal(live.weight, saved.weight)
    write_step(tmp_path, 2, {"model": nn.Linear(2, 2)})
    restore(tmp_path, {"model": live.state_dict()})
    assert not torch.equal(live.weight, saved.weight)


def test_parts_that_are_not_chosen_stay_as_they_are(tmp_path: Path):
    """Also in a module that goes through load_state_dict."""
    saved, live = nn.Sequential(WithExtra(1), nn.Linear(2, 2)), nn.Sequential(WithExtra(2), nn.Linear(2, 2))
    write_step(tmp_path, 1, {"model": saved})
    kept = live[1].weight.clone()
    restore(tmp_path, {"model": live}, exclude=["model.1.weight", "model.0._extra_state"])
    assert live[0].extra == 2
    assert torch.equal(live[1].weight, kept)
    assert torch.equal(live[1].bias, saved[1].bias)
