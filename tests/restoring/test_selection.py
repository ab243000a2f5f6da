from __future__ import annotations

from typing import Any

import pytest

from aiockpt.errors import ConfigError
from aiockpt.restoring.selection import ALL, Selection

NAMES = ["model", "model.0.weight", "model.0.bias", "model2.weight", "optimizer.state.model.0.weight.exp_avg", "rng"]


@pytest.mark.parametrize(
    ("include", "exclude", "taken"),
    [
        (None, None, NAMES),
        ("model", None, ["model", "model.0.weight", "model.0.bias"]),
        ("model.*", None, ["model.0.weight", "model.0.bias"]),
        (["model.0"], None, ["model.0.weight", "model.0.bias"]),
        ("mod*", None, ["model", "model.0.weight", "model.0.bias", "model2.weight"]),
        ("*.weight", None, ["model.0.weight", "model2.weight", "optimizer.state.model.0.weight.exp_avg"]),
        ("model.?.bias", None, ["model.0.bias"]),
        ("[mr]*", None, ["model", "model.0.weight", "model.0.bias", "model2.weight", "rng"]),
        (["rng", "model2"], None, ["model2.weight", "rng"]),
        (None, "model", ["model2.weight", "optimizer.state.model.0.weight.exp_avg", "rng"]),
        ("model", ["*.bias"], ["model", "model.0.weight"]),
        ([], None, []),
        (None, [], NAMES),
        ("Model", None, []),
        ("model+", None, []),
    ],
)
def test_a_pattern_takes_names_and_all_that_is_below_them(include: Any, exclude: Any, taken: list[str]):
    """Shell patterns on dotted names; a prefix stands for its whole part of the state; exclude is stronger."""
    selection = Selection(include, exclude)
    assert [name for name in NAMES if selection.takes(name)] == taken


def test_what_is_indivisible_goes_by_its_name_or_by_what_is_below():
    """``rng`` and ``rng.*`` are the same for an object."""
    assert Selection("rng.*").takes_whole("rng")
    assert Selection("rng").takes_whole("rng")
    assert not Selection(None, "rng.*").takes_whole("rng")
    assert not Selection("rng.python").takes_whole("rng")
    assert ALL.takes_whole("rng")


def test_idle_patterns_are_those_that_fit_nothing():
    """A misspelt include restores nothing, silently; so it is found."""
    selection = Selection(["model", "modle.*", "rng.*", "x"])
    assert selection.idle_includes(NAMES) == ["modle.*", "x"]
    assert Selection(None, "x").idle_includes(NAMES) == []


@pytest.mark.parametrize("bad", [5, [5], [""], "", [None]])
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_what_is_no_pattern_is_refused(argument: str, bad: Any):
    """With the argument's name."""
    with pytest.raises(ConfigError, match="is no pattern") as error:
        Selection(**{argument: bad})
    assert error.value.argument == argument
    assert error.value.next
