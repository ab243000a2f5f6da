"""Values without an end: circles, depth, numbers of items."""

from __future__ import annotations

import sys
from collections import OrderedDict, defaultdict
from typing import Any

import pytest

from aiockpt.errors import CheckpointCorruptError, UnsupportedValueError
from aiockpt.format import values
from aiockpt.format.values import MAX_DEPTH, MAX_ITEMS, decode_value, encode_value
from tests.format.valuing import Hostile, through_json


def holds_itself(kind: str) -> Any:
    if kind == "list":
        items: list[Any] = [0]
        items.append(items)
        return items
    if kind == "two lists":
        inner: list[Any] = []
        outer = [inner]
        inner.append(outer)
        return outer
    if kind == "tuple":
        cell: list[Any] = []
        pair = (cell,)
        cell.append(pair)
        return pair
    mapping: Any = {"dict": dict, "OrderedDict": OrderedDict, "defaultdict": lambda: defaultdict(list)}[kind]()
    mapping["self"] = mapping
    return mapping


@pytest.mark.parametrize("kind", ["list", "two lists", "tuple", "dict", "OrderedDict", "defaultdict"])
def test_containers_that_hold_themselves(kind: str) -> None:
    """A circle is refused where it closes."""
    with pytest.raises(UnsupportedValueError, match="holds itself") as caught:
        encode_value([holds_itself(kind)], key=("v",))
    assert caught.value.key is not None
    assert caught.value.key.startswith("v.0.")
    assert caught.value.next


NESTERS: dict[str, Any] = {
    "list": lambda inner: [inner],
    "tuple": lambda inner: (inner,),
    "dict": lambda inner: {"k": inner},
    "pairs": lambda inner: {1: inner},
    "OrderedDict": lambda inner: OrderedDict(k=inner),
    "defaultdict": lambda inner: defaultdict(list, k=inner),
    "frozenset": lambda inner: frozenset([inner]),
    "key": lambda inner: {inner: 0} if isinstance(inner, int) else frozenset([(inner,)]),
}


def nested(kind: str, depth: int) -> Any:
    value: Any = 1 << 70
    for _ in range(depth // (2 if kind == "key" else 1)):
        value = NESTERS[kind](value)
    return value


@pytest.mark.parametrize("kind", sorted(NESTERS.keys() - {"key"}))
def test_deepest(kind: str) -> None:
    """The deepest containers of every kind go there and back; one more is refused, and so are very many."""
    assert through_json(nested(kind, MAX_DEPTH)) == nested(kind, MAX_DEPTH)
    for depth in (MAX_DEPTH + 1, 900):
        with pytest.raises(UnsupportedValueError, match="deeper than") as caught:
            encode_value(nested(kind, depth), key=("v",))
        assert len(str(caught.value)) < 1500


def at_stack_depth(frames: int, function: Any) -> Any:
    return function() if frames == 0 else at_stack_depth(frames - 1, function)


def test_a_caller_deep_in_the_stack() -> None:
    """Where Python's stack ends first, that is said too, as an error of ours."""
    value = nested("OrderedDict", MAX_DEPTH)
    json = encode_value(value, key=("v",))
    frames = sys.getrecursionlimit() - 300
    with pytest.raises(UnsupportedValueError, match="stack"):
        at_stack_depth(frames, lambda: encode_value(value, key=("v",)))
    with pytest.raises(CheckpointCorruptError):
        at_stack_depth(frames, lambda: decode_value(json, file="m"))


def test_shared_containers_do_not_take_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 lists, each of which holds the one before twice, are 2**60 items: refused when it is clear."""
    assert MAX_ITEMS == 1 << 20
    monkeypatch.setattr(values, "MAX_ITEMS", 10_000)  # a second less
    value: Any = []
    for _ in range(60):
        value = [value, value]
    with pytest.raises(UnsupportedValueError, match="more than 10000 items"):
        encode_value(value, key=("v",))


def test_items_are_counted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that is too long is refused before it is looked at; many short ones count together."""
    monkeypatch.setattr(values, "MAX_ITEMS", 10)
    assert encode_value([[1] * 4] * 2, key=())
    for value in ([Hostile()] * 11, [[1] * 4] * 3, {"a": [0] * 5, "b": {"c": (0,) * 5}}):
        with pytest.raises(UnsupportedValueError, match="more than 10 items"):
            encode_value(value, key=())
