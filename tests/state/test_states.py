"""Whole states: made up by hypothesis, and planned as a save plans them."""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.tree import walk
from aiockpt.planning.local import plan_local
from aiockpt.state.collect import collect
from tests.state.rebuild import round_trip, same

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.datetimes(timezones=st.none())
)
keys = (
    st.text(max_size=6)
    | st.integers(-9, 9)
    | st.booleans()
    | st.none()
    | st.tuples(st.integers(0, 3), st.text(max_size=2))
)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
tensors = st.builds(
    lambda shape, dtype: torch.arange(int(np.prod(shape)), dtype=torch.int32).reshape(shape).to(dtype),
    shapes,
    st.sampled_from(
        [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.complex128, torch.uint8]
    ),
)
arrays = st.builds(
    lambda shape, dtype: np.ones(shape, dtype=dtype),
    shapes,
    st.sampled_from(["<f4", ">i2", "<U3", "?", "<M8[s]", "<c16"]),
)
leaves = scalars | tensors | arrays | st.just(b"x" * 5000)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    mappings = st.dictionaries(keys, inner, max_size=4)
    return (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | mappings
        | mappings.map(OrderedDict)
        | mappings.map(lambda items: defaultdict(list, items))
    )


class Thing:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, state: Any) -> None:
        self.value = state


values = st.recursive(leaves, containers, max_leaves=12)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=6), values, max_size=4), st.booleans())
def test_any_nested_state_round_trips(state: dict[str, Any], as_object: bool):
    """Every state of values and tensors comes back with its types, by keys or through an object."""
    assert same(round_trip({"o": Thing(state)} if as_object else state), {"o": state} if as_object else state)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=6), values, max_size=4))
def test_names_agree_with_the_tree(state: dict[str, Any]):
    """The path of every tensor and value in the tree is that of its entry; a plan takes it or names both."""
    collected = collect(state)
    seen: dict[int, list[tuple[str, ...]]] = {}
    for path, leaf in walk(collected.tree):
        number = leaf[1] if isinstance(leaf, list) else leaf
        seen.setdefault(number, []).append(path)
    assert seen.keys() == {*range(len(collected.entries)), *(-i - 1 for i in range(len(collected.values)))}
    for number, entry in enumerate(collected.entries):
        assert entry.segments in seen[number]
    for number, (path, _) in enumerate(collected.values):
        assert seen[-number - 1] == [path]
    assert len(collected.tensors) == len(collected.entries)
    try:
        plan = plan_local(collected.entries, collected.tree, collected.plain_files)
    except UnsupportedValueError as exc:  # two keys that read the same
        assert exc.other_key  # either outcome is right
    else:
        assert [tensor.nbytes for tensor in collected.tensors] == list(plan.sizes)


def test_collecting_twice_gives_equal_plans():
    """A training loop plans once: entries and tree of the next save are equal."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "progress": {"step": 1}}
    first = collect(state)
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    state["progress"] = {"step": 2}
    second = collect(state)
    assert first.entries == second.entries
    assert first.tree == second.tree
    assert first.values != second.values


def _adamw_state() -> dict[str, Any]:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(125)])
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


@pytest.mark.parametrize("slack", [10, pytest.param(1, marks=pytest.mark.timing)])
@pytest.mark.parametrize(
    ("make", "bound"),
    [(_adamw_state, 0.004), (lambda: {f"t{i}": torch.zeros(4) for i in range(10_000)}, 0.035)],
    ids=["1,000 of AdamW", "10,000 in a dict"],
)
def test_collecting_is_quick(make: Any, bound: float, slack: int):
    """The training thread waits for it at each save: microseconds for a tensor."""
    state = make()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        collected = collect(state)
        times.append(time.perf_counter() - start)
    assert len(collected.entries) in (1000, 10_000)
    assert min(times) < bound * slack
