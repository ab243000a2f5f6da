"""Values: back by exact type."""

from __future__ import annotations

import datetime
import math
import sys
from collections import Counter, OrderedDict, defaultdict
from decimal import Decimal
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiockpt.errors import CheckpointCorruptError, UnsupportedValueError
from aiockpt.format.values import decode_value, encode_value
from tests.format.valuing import fingerprint, through_json

OFFSETS = st.timedeltas(datetime.timedelta(hours=-23, minutes=-59), datetime.timedelta(hours=23, minutes=59))
ZONES = st.builds(datetime.timezone, OFFSETS) | st.builds(datetime.timezone, OFFSETS, st.text(max_size=5))
TEXTS = st.text(st.characters(), max_size=6) | st.text(st.characters(categories=["Cs"]), max_size=2)
PATHS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8).map(Path)
MOMENTS = st.builds(
    lambda moment, zone, fold: moment.replace(tzinfo=zone, fold=fold),
    st.datetimes(),
    st.none() | ZONES,
    st.integers(0, 1),
)
KEYS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | TEXTS
    | TEXTS.map("~".__add__)
    | st.binary(max_size=6)
    | MOMENTS
    | PATHS
)
HASHABLE = st.recursive(
    KEYS,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
STREAMS = st.builds(
    lambda data, position: [stream := BytesIO(data), stream.seek(position)][0], st.binary(max_size=6), st.integers(0, 9)
)
VALUES = st.recursive(
    HASHABLE | STREAMS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.sets(HASHABLE, max_size=3)
        | st.dictionaries(TEXTS, inner, max_size=3)
        | st.dictionaries(HASHABLE, inner, max_size=3)
        | st.dictionaries(HASHABLE, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(HASHABLE, st.integers(), max_size=3).map(Counter)
        | st.builds(
            defaultdict, st.sampled_from([None, list, dict, int, float]), st.dictionaries(HASHABLE, inner, max_size=3)
        )
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_round_trip(value: object) -> None:
    """Any allowed value comes back with its types, its order and its bits."""
    assert fingerprint(through_json(value)) == fingerprint(value)


EXACT: list[Any] = [
    None,
    True,
    0,
    (1 << 63) - 1,
    -(1 << 63),
    -(1 << 63) - 1,
    (1 << 64) - 1,
    1 << 64,
    1 << 20_000,
    -(7**9000),
    0.0,
    -0.0,
    1.0,
    1e22,
    5e-324,
    sys.float_info.max,
    math.nan,
    math.inf,
    -math.inf,
    complex(math.nan, -0.0),
    complex(-0.0, math.inf),
    "",
    "~",
    "\0 \ud800 ü \U0001f600",
    b"",
    bytes(range(256)),
    [],
    (),
    {},
    set(),
    frozenset(),
    [[], [()], {}],
    {"b": 1, "a": 2},
    {"": 1},
    {"~": 1},
    {"~tuple": [1]},
    {"~a": 1, "~b": 2},
    {"~\ud800": 1},
    {1: "int", "1": "text", 1.5: "float", (1,): "tuple", None: "none", b"1": "bytes"},
    {True: "bool"},
    {1.0: "float"},
    {math.nan: 1},
    {frozenset({frozenset(), frozenset({1})}), frozenset({2})},
    {1, 2.5, "x", None, (3, "y")},
    OrderedDict([("z", 1), ("a", OrderedDict())]),
    Counter("aab"),
    Counter({"x": -1, 2: 0}),
    defaultdict(list, {"a": [1]}),
    defaultdict(None, {1: 2}),
    defaultdict(float),
    BytesIO(),
    datetime.datetime.min,
    datetime.datetime.max.replace(tzinfo=datetime.UTC),
    datetime.datetime(2026, 3, 29, 2, 30, fold=1),
    datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(seconds=3661, microseconds=7))),
    datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=2), "CEST")),
    datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(0), "GMT")),
    Path(),
    Path("/a/../b"),
    Path("/data/\udcff"),
]


@pytest.mark.parametrize("value", EXACT, ids=lambda value: type(value).__name__)
def test_exact(value: object) -> None:
    """The odd values that a training state holds, one by one."""
    assert fingerprint(through_json(value)) == fingerprint(value)


def test_position_of_a_stream() -> None:
    """A BytesIO comes back where it stood, also behind its end; the one that was saved stands where it stood."""
    stream = BytesIO(b"abc")
    stream.seek(7)
    assert through_json(stream).tell() == 7
    assert stream.tell() == 7


def test_plain_values_are_plain_json() -> None:
    """What JSON has is stored as that, so that people and other programs read it."""
    value = {"lr": 0.1, "steps": [1, 2], "name": "x", "none": None, "on": True}
    assert encode_value(value, key=()) == value


def test_what_comes_back_is_fresh() -> None:
    """A list that stands twice comes back as two; nothing is shared with the JSON."""
    inner: list[int] = []
    json = encode_value([inner, inner], key=())
    first, second = decode_value(json, file="m")
    assert first is not second
    assert first is not json[0]


def test_more_types() -> None:
    """Types of torch and numpy are given by the caller; the rules for all others stay."""

    def more(value: object) -> tuple[str, Any] | None:
        return ("Decimal", str(value)) if type(value) is Decimal else None

    json = encode_value({"a": (Decimal("1.50"),)}, key=(), more=more)
    assert json == {"a": {"~tuple": [{"~Decimal": "1.50"}]}}
    assert str(decode_value(json, file="m", more={"Decimal": Decimal})["a"][0]) == "1.50"
    with pytest.raises(CheckpointCorruptError, match="~Decimal"):
        decode_value(json, file="m")
    with pytest.raises(UnsupportedValueError):
        encode_value(Fraction(1, 2), key=("k",), more=more)
