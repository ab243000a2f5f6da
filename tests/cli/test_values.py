"""Values as text: as Python shows them, in little room, whatever the JSON is."""

from __future__ import annotations

import datetime
from collections import Counter, OrderedDict, defaultdict
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aiockpt.cli.value_text import items_of, value_text
from aiockpt.state.values import encode_values

TAGS = (
    *("~tuple", "~set", "~frozenset", "~dict", "~OrderedDict", "~Counter", "~defaultdict", "~int", "~float", "~new"),
    *("~complex", "~str", "~bytes", "~BytesIO", "~datetime", "~Path", "~dtype", "~device", "~Size", "~numpy"),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(), inner)
        | st.dictionaries(st.sampled_from(TAGS), inner, min_size=1, max_size=1)
    ),
)


def encoded(value: object) -> Any:
    return msgspec.json.decode(encode_values([(("v",), value)]))[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (True, "True"),
        (-3, "-3"),
        (1 << 80, "1208925819614629174706176"),
        ([1 << 20000], "[0x1" + "0" * 55 + "…]"),
        (0.1, "0.1"),
        (float("nan"), "nan"),
        (-float("inf"), "-inf"),
        (1 - 2j, "1.0-2.0j"),
        ("it's", '"it\'s"'),
        ("\x1b[31m\n", r"'\x1b[31m\n'"),
        ("\udc80", r"'\udc80'"),
        (b"ab", "b'ab'"),
        (b"a" * 1000, "bytes, 1000 B"),
        (BytesIO(b"abc"), "BytesIO, 3 B"),
        ([], "[]"),
        ([1, "a"], "[1, 'a']"),
        ((1,), "(1,)"),
        ((), "()"),
        ({"lr": 0.1, "betas": (0.9, 0.95)}, "{lr: 0.1, betas: (0.9, 0.95)}"),
        ({1: 2, None: 3, (1, 2): 4}, "{1: 2, None: 3, (1, 2): 4}"),
        ({"~odd": 1}, "{~odd: 1}"),
        (OrderedDict(a=1), "OrderedDict{a: 1}"),
        (Counter("aab"), "Counter{a: 2, b: 1}"),
        (defaultdict(list, {"a": [1]}), "defaultdict{a: [1]}"),
        (set(), "set()"),
        ({2}, "{2}"),
        (frozenset({2}), "frozenset{2}"),
        (datetime.datetime(2026, 1, 2, 3, 4, 5), "2026-01-02T03:04:05"),
        (Path("/a b"), "Path('/a b')"),
        (torch.Size([1, 2]), "Size[1, 2]"),
        (torch.bfloat16, "torch.dtype bfloat16"),
        (torch.device("cuda:1"), "device cuda:1"),
        (np.float32(1.5), "1.5"),
        (np.int64(-7), "-7"),
        (np.bool_(True), "True"),
        (np.str_("abc"), "numpy <U3"),
    ],
)
def test_every_type(value: object, text: str) -> None:
    """As a reader of Python expects it."""
    assert value_text(encoded(value)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (list(range(1000)), "[0, 1, 2, 3, 4, … 1000 items]"),
        ((3, tuple(range(600)), None), "(3, (… 600 items), None)"),
        ({"a": "x" * 100, "b": 1}, "{… 2 items}"),
        ("x" * 100, "'xxxxxxxxxxxx'… 100 characters"),
        ([[[[[[[[[[1]]]]]]]]]], "[[[[[[[[[… 1 items]]]]]]]]]"),
    ],
)
def test_long_values_are_cut(value: object, text: str) -> None:
    """And say how much they have."""
    assert value_text(encoded(value), 30) == text


def test_a_huge_value_is_not_walked() -> None:
    """A list of a million is cut as fast as one of a hundred."""
    items = [0] * (1 << 20)
    assert value_text(items, 20) == "[0, … 1048576 items]"


@settings(max_examples=40, deadline=None)
@given(JSON, st.integers(0, 80))
def test_any_json_is_one_line_of_plain_text(json: Any, room: int) -> None:
    """Nothing that a terminal acts on, nothing much longer than asked for; what is none of ours is shown as it is."""
    text = value_text(json, room)
    assert text.isprintable()
    assert len(text) < 5 * room + 200
    items = items_of(json)
    assert items is None or all(key.isprintable() for key, _ in items)
