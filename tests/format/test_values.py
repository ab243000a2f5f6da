"""Values: back by exact type, or refused by name."""

from __future__ import annotations

import collections
import datetime
import enum
import math
import struct
import sys
import zoneinfo
from collections import Counter, OrderedDict, defaultdict
from decimal import Decimal
from fractions import Fraction
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiockpt.errors import CheckpointCorruptError, UnsupportedValueError
from aiockpt.format import values
from aiockpt.format.values import MAX_DEPTH, MAX_ITEMS, decode_value, encode_value


def through_json(value: object) -> Any:
    """Return the value as a reader finds it, by way of bytes."""
    text = msgspec.json.encode(encode_value(value, key=("v",)))
    return decode_value(msgspec.json.decode(text), file="m")


def fingerprint(value: Any) -> Any:
    """Return something hashable that is equal only for values of the same types, orders and bits."""
    kind = type(value)
    if kind is float:
        return kind, "nan" if math.isnan(value) else struct.pack("<d", value)
    if kind is complex:
        return kind, fingerprint(value.real), fingerprint(value.imag)
    if kind in (list, tuple):
        return kind, tuple(map(fingerprint, value))
    if kind in (set, frozenset):
        return kind, frozenset(Counter(map(fingerprint, value)).items())  # NaN may be there twice
    if kind in (dict, OrderedDict, Counter):
        return kind, tuple((fingerprint(k), fingerprint(v)) for k, v in value.items())
    if kind is defaultdict:
        return kind, value.default_factory, fingerprint(dict(value))
    if kind is BytesIO:
        return kind, value.getvalue(), value.tell()
    if kind is datetime.datetime:
        return kind, value.replace(tzinfo=None), value.fold, type(value.tzinfo), value.utcoffset(), value.tzname()
    return kind, value


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


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Mode(enum.StrEnum):
    EVAL = "eval"


class Flags(enum.Flag):
    A = 1


Point = collections.namedtuple("Point", "x y")


class OwnDict(dict[Any, Any]):
    pass


class OwnInt(int):
    pass


class OwnStr(str):
    __slots__ = ()


class OwnFloat(float):
    pass


class OwnList(list[Any]):
    pass


class OwnPath(type(Path())):  # type: ignore[misc]
    pass


class Hostile:
    """Its text is user's code that fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __repr__


UNSUPPORTED: list[tuple[Any, str, str]] = [
    (Colour.RED, "Colour", "without pickle"),
    (Level.LOW, "Level", "subclass of int"),
    (Mode.EVAL, "Mode", "subclass of str"),
    (Flags.A, "Flags", "without pickle"),
    (Point(1, 2), "Point", "subclass of tuple"),
    (OwnDict(), "OwnDict", "subclass of dict"),
    (OwnInt(3), "OwnInt", "subclass of int"),
    (OwnStr("x"), "OwnStr", "subclass of str"),
    (OwnFloat(1), "OwnFloat", "subclass of float"),
    (OwnList(), "OwnList", "subclass of list"),
    (OwnPath("x"), "OwnPath", "subclass of PosixPath"),
    (PurePosixPath("x"), "PurePosixPath", "without pickle"),
    (bytearray(b"x"), "bytearray", "without pickle"),
    (memoryview(b"x"), "memoryview", "without pickle"),
    (range(3), "range", "without pickle"),
    (datetime.date(2026, 1, 1), "date", "without pickle"),
    (datetime.timedelta(1), "timedelta", "without pickle"),
    (Decimal(1), "Decimal", "without pickle"),
    (Fraction(1, 2), "Fraction", "without pickle"),
    (object(), "object", "without pickle"),
    (Hostile(), "Hostile", "without pickle"),
    (len, "builtin_function_or_method", "without pickle"),
    (int, "type", "without pickle"),
    ((i for i in ()), "generator", "without pickle"),
    ({}.keys(), "dict_keys", "without pickle"),
    (defaultdict(lambda: 1), "defaultdict", "list, dict, int, float"),
    (defaultdict(set), "defaultdict", "list, dict, int, float"),
    (datetime.datetime(2026, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")), "datetime", "datetime.timezone"),
]


@pytest.mark.parametrize(("value", "type_name", "why"), UNSUPPORTED, ids=[name for _, name, _ in UNSUPPORTED])
@pytest.mark.parametrize("place", ["alone", "list", "dict", "tuple in pairs", "value of a default"])
def test_refused_by_key_and_type(value: Any, type_name: str, why: str, place: str) -> None:
    """What would not come back as it is, is refused wherever it stands; the error names where, what, why and next."""
    key, holder = {
        "alone": ("run.x", value),
        "list": ("run.x.1", [0, value]),
        "dict": ("run.x.a.b", {"a": {"b": value}}),
        "tuple in pairs": ("run.x.3.0", {3: (value,)}),
        "value of a default": ("run.x.k", defaultdict(int, {"k": value})),
    }[place]
    with pytest.raises(UnsupportedValueError) as caught:
        encode_value(holder, key=("run", "x"))
    error = caught.value
    assert error.key == key
    assert error.type_name is not None
    assert error.type_name.endswith(type_name)
    assert key in error.what
    assert error.type_name in error.what
    assert why in error.why
    assert error.next


@pytest.mark.parametrize(
    ("holder", "key", "type_name"),
    [
        ({Level.LOW: 1}, "x.<Level>", "Level"),
        ({(Point(1, 2),): 1}, "x.<tuple>.0", "Point"),
        ({frozenset({Mode.EVAL})}, "x.<frozenset>.<Mode>", "Mode"),
        ({Colour.RED: 1}, "x.<Colour>", "Colour"),
        (Counter([Colour.RED]), "x.<Colour>", "Colour"),
        ({Hostile(): 1}, "x.<Hostile>", "Hostile"),
        ({Hostile()}, "x.<Hostile>", "Hostile"),
        ({10**5000: Colour.RED}, "x.<int>", "Colour"),
        ({-3: Colour.RED}, "x.-3", "Colour"),
        ({None: {0.5: Colour.RED}}, "x.None.0.5", "Colour"),
    ],
)
def test_refused_as_keys_and_members(holder: Any, key: str, type_name: str) -> None:
    """Keys and members of sets are looked at like everything else, and no code of theirs is run for the message."""
    with pytest.raises(UnsupportedValueError) as caught:
        encode_value(holder, key=("x",))
    assert caught.value.key == key
    assert caught.value.type_name is not None
    assert caught.value.type_name.endswith(type_name)


def test_closed_stream() -> None:
    """A closed BytesIO has no content any more."""
    stream = BytesIO(b"x")
    stream.close()
    with pytest.raises(UnsupportedValueError, match="closed") as caught:
        encode_value({"stream": stream}, key=("data",))
    assert caught.value.key == "data.stream"


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


HOSTILE_JSON: list[Any] = [
    {"~no such type": 1},
    {"~": 1},
    {"~tuple": 1},
    {"~tuple": {"a": 1}},
    {"~tuple": None},
    {"~set": [[1]]},
    {"~set": [{"a": 1}]},
    {"~set": "ab"},
    {"~frozenset": [{"~set": [1]}]},
    {"~dict": [[1]]},
    {"~dict": [[1, 2, 3]]},
    {"~dict": [1]},
    {"~dict": {"a": 1}},
    {"~dict": [[[1], 2]]},
    {"~OrderedDict": "ab"},
    {"~Counter": [[{}, 1]]},
    {"~defaultdict": []},
    {"~defaultdict": ["list"]},
    {"~defaultdict": ["set", []]},
    {"~defaultdict": [["list"], []]},
    {"~defaultdict": [1, []]},
    {"~defaultdict": ["list", [], 1]},
    {"~int": 1},
    {"~int": ""},
    {"~int": "0xg"},
    {"~int": "one"},
    {"~float": "1.5"},
    {"~float": 1.5},
    {"~float": ["nan"]},
    {"~complex": ["1", "2", "3"]},
    {"~complex": [1, 2]},
    {"~complex": ["1", "x"]},
    {"~complex": "12"},
    {"~str": "!!"},
    {"~str": "/w=="},
    {"~str": ["YQ=="]},
    {"~bytes": "YQ="},
    {"~bytes": "ü"},
    {"~bytes": [1]},
    {"~BytesIO": ["YQ==", -1]},
    {"~BytesIO": ["YQ==", "0"]},
    {"~BytesIO": ["YQ==", True]},
    {"~BytesIO": ["YQ==", 1 << 70]},
    {"~BytesIO": "YQ=="},
    {"~datetime": "2026-01-01T00:00:00"},
    {"~datetime": ["2026-13-01T00:00:00", 0, None]},
    {"~datetime": ["2026-01-01T00:00:00", 2, None]},
    {"~datetime": ["2026-01-01T00:00:00", "0", None]},
    {"~datetime": ["2026-01-01T00:00:00", 0, "CET"]},
    {"~datetime": ["2026-01-01T00:00:00+01:00", 0, 5]},
    {"~datetime": ["2026-01-01T00:00:00+25:00", 0, None]},
    {"~datetime": [0, 0, None]},
    {"~Path": 1},
    {"~Path": {"~bytes": "YQ=="}},
    {"~Path": ["a"]},
    [1, [{"a": {"~tuple": 5}}]],
]


@pytest.mark.parametrize("json", HOSTILE_JSON, ids=str)
def test_hostile_json(json: Any) -> None:
    """JSON that no writer makes is an error that names the file, not another exception and not another value."""
    with pytest.raises(CheckpointCorruptError) as caught:
        decode_value(json, file="step-3/manifest.json")
    assert caught.value.file == "step-3/manifest.json"
    assert "step-3/manifest.json" in caught.value.what
    assert caught.value.why
    assert caught.value.next
    assert len(str(caught.value)) < 500


TAGS = [
    *("~tuple", "~set", "~frozenset", "~dict", "~OrderedDict", "~Counter", "~defaultdict"),
    *("~int", "~float", "~complex", "~str", "~bytes", "~BytesIO", "~datetime", "~Path"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(TAGS),
            inner,
            min_size=1,
            max_size=1,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_any_json(json: Any) -> None:
    """Any JSON is a value or the error; what is a value goes there and back."""
    try:
        value = decode_value(json, file="m")
    except CheckpointCorruptError:
        return
    assert fingerprint(through_json(value)) == fingerprint(value)


@pytest.mark.parametrize("opening", ["[", '{"~tuple":[', '{"a":', '{"~dict":[[0,', '{"~set":['])
@pytest.mark.parametrize("depth", [MAX_DEPTH + 2, 300])
def test_deep_json(opening: str, depth: int) -> None:
    """JSON that is nested deeper than any writer nests is refused."""
    closing = opening.translate({ord("["): "]", ord("{"): "}"})[::-1]
    closing = "".join(character for character in closing if character in "]}")
    with pytest.raises(CheckpointCorruptError, match="deeper"):
        decode_value(msgspec.json.decode(opening * depth + "1" + closing * depth), file="m")
