from __future__ import annotations

import datetime
import enum
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from aiockpt.errors import CheckpointCorruptError, UnsupportedValueError
from aiockpt.state.collect import collect
from aiockpt.state.parameters import parameter_names
from aiockpt.state.values import (
    MAX_VALUES_NBYTES,
    blob_value,
    decode_all,
    decode_key,
    encode_key,
    encode_metadata,
    encode_values,
)
from tests.state.rebuild import round_trip, same

KEPT: list[Any] = [
    None,
    True,
    0,
    -(1 << 63),
    1 << 70,
    float("nan"),
    float("-inf"),
    -0.0,
    5e-324,
    1 - 2j,
    complex("nan"),
    "ä\n\0😀",
    "\ud800 lone",
    b"",
    b"\0\xff",
    b"x" * 5000,
    [],
    (),
    {},
    set(),
    frozenset({1, "a"}),
    {1, (2, 3)},
    [1, [2, (3, {"a": None})]],
    {"a": 1, "b": {"c": (1, 2)}},
    {1: "a", None: "b", 2.5: "c", (1, "x"): "d", False: "e", b"k": "f"},
    {"~tuple": 1},
    OrderedDict([("z", 1), ("a", 2)]),
    Counter({"a": 2, 3: 1}),
    defaultdict(list, {"a": [1]}),
    defaultdict(None, {1: 2}),
    BytesIO(b"abc"),
    BytesIO(b"y" * 5000),
    datetime.datetime(2026, 1, 2, 3, 4, 5, 6),
    datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
    Path("/a/b c"),
    torch.Size([2, 3]),
    torch.float8_e4m3fn,
    torch.half,
    torch.device("cuda:1"),
    torch.device("cpu"),
    np.float32(1.5),
    np.float64("nan"),
    np.int8(-3),
    np.uint64((1 << 64) - 1),
    np.bool_(True),
    np.complex64(1 + 2j),
    np.str_("text"),
    np.bytes_(b"bytes"),
    np.datetime64("2026-01-02"),
    np.longdouble(1) / 3,
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.arange(6, dtype=np.int64).reshape(2, 3).T,
    np.arange(6)[::-2],
    np.array(3.5),
    np.array([], dtype=np.uint16),
    np.zeros((0, 3), dtype="<U4"),
    np.array([True, False]),
    np.array([1 + 2j]),
    np.array([1.5, 2.5], dtype=">f8"),
    np.array(["a", "bcd"]),
    np.array([b"a", b"bcd"]),
    np.array("0-d text"),
    np.array(["2026-01-02", "NaT"], dtype="datetime64[s]"),
    np.array([1, 2], dtype=np.longdouble),
    np.frombuffer(b"abcdefgh", dtype=np.uint16),  # read only
    [torch.ones(2), 3],
    (np.arange(3), "x"),
    {"deep": [{"t": (torch.zeros(1), None)}, b"z" * 5000]},
]


class Thing:
    """An object of the state that holds one value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, state: Any) -> None:
        self.value = state


@pytest.mark.parametrize("place", ["key", "list", "object", "deep object"])
@pytest.mark.parametrize("value", KEPT, ids=[f"{type(v).__name__}{i}" for i, v in enumerate(KEPT)])
def test_a_value_round_trips_by_type(value: Any, place: str):
    """Each kind of value comes back with its type and content, wherever it stands."""
    wrap = {
        "key": lambda v: v,
        "list": lambda v: [v, torch.ones(1)],
        "object": Thing,
        "deep object": lambda v: Thing({"a": [v], "b": torch.ones(1)}),
    }[place]
    expected = {
        "key": value,
        "list": [value, torch.ones(1)],
        "object": value,
        "deep object": {"a": [value], "b": torch.ones(1)},
    }[place]
    assert same(round_trip({"x": wrap(value)})["x"], expected)


Pair = namedtuple("Pair", "a b")


class Colour(enum.Enum):
    RED = 1


class Number(enum.IntEnum):
    ONE = 1


class Text(str):
    __slots__ = ()


class MyDict(dict):  # type: ignore[type-arg]
    pass


class OnlySaves:
    def state_dict(self) -> dict[str, int]:
        return {}


REFUSED: list[Any] = [
    Pair(1, 2),
    Colour.RED,
    Number.ONE,
    Text("x"),
    MyDict(a=1),
    len,
    lambda: None,
    object(),
    int,
    OnlySaves(),
    torch.nn.Linear,
    deque([1]),
    MappingProxyType({"a": 1}),
    defaultdict(lambda: 1),
    datetime.date(2026, 1, 1),
    datetime.timedelta(1),
    range(3),
    bytearray(b"x"),
    torch.Generator(),
    {torch.ones(1): 1},
    {"s": {Pair(1, 2)}},
    Counter({"a": Colour.RED}),
    np.array([object()]),
    np.zeros(2, dtype=[("a", "<i4")]),
    np.zeros(1, dtype=[("a", "<i4")])[0],
    np.zeros(2).view(np.recarray),
    np.ma.masked_array([1]),
]


@pytest.mark.parametrize(
    "place",
    [lambda v: v, lambda v: [1, v], lambda v: Thing({"k": v, "t": torch.ones(1)})],
    ids=["key", "list", "object"],
)
@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_any_other_value_is_refused_by_key_and_type(value: Any, place: Any):
    """Named tuples, enums, other subclasses, functions and all else are refused, not flattened."""
    with pytest.raises(UnsupportedValueError) as caught:
        encode_values(collect({"a": {"b": place(value)}}).values)
    assert caught.value.key is not None
    assert caught.value.key.startswith("a.b")
    assert caught.value.type_name
    assert caught.value.why
    assert caught.value.next


@pytest.mark.parametrize("state", [[], None, 3, torch.nn.Linear(1, 1), torch.ones(1)], ids=type)
def test_a_state_that_is_no_mapping_is_refused(state: Any):
    """The state itself has to give names."""
    with pytest.raises(UnsupportedValueError, match="a state is a mapping"):
        collect(state)


def test_each_key_of_the_users_mapping_is_its_own_value():
    """In the user's mappings every key is a node, so that each can be chosen by name; lists are one value."""
    collected = collect({"progress": {"epoch": 3, "seen": [1, 2], "empty": {}}, "name": "x"})
    assert collected.tree == {"progress": {"epoch": -1, "seen": -2, "empty": {}}, "name": -3}
    assert collected.values == [(("progress", "epoch"), 3), (("progress", "seen"), [1, 2]), (("name",), "x")]


def test_mappings_of_other_kinds_keep_theirs():
    """Ordered and default dicts, and keys that are no text, are tagged in the tree."""
    state = OrderedDict(a=defaultdict(list, x=torch.ones(1)), b={1: torch.zeros(1)}, c=OrderedDict(t=1))
    collected = collect(state)
    assert collected.tree == [
        "OrderedDict",
        [["a", ["defaultdict:list", [["x", 0]]]], ["b", ["dict", [[1, 1]]]], ["c", ["OrderedDict", [["t", -1]]]]],
    ]
    assert [entry.segments for entry in collected.entries] == [("a", "x"), ("b", "1")]
    assert same(round_trip(state), state)


def test_any_mapping_may_be_the_state_itself():
    """The outermost mapping is read as a dict."""
    assert collect(MappingProxyType({"a": 1})).tree == {"a": -1}


KEYS = [
    "a.b",
    "a/b",
    "a b",
    "",
    "ü😀",
    "~x",
    "\0",
    "..",
    "\ud800",
    1,
    True,
    None,
    (1, "a"),
    2.5,
    b"k",
    np.int64(4),
    frozenset({1}),
]


@pytest.mark.parametrize("key", KEYS, ids=repr)
def test_every_kind_of_key_names_its_tensor(key: Any):
    """Keys with dots, slashes, spaces, unicode, and keys that are no text come back as they were."""
    state = {"top": {key: torch.ones(2), "v": {key: 1}}}
    collected = collect(state)
    assert len(collected.entries[0].segments) == 2
    assert all(type(segment) is str for segment in collected.entries[0].segments)
    collected.entries[0].segments[1].encode()  # what a header can hold
    assert same(round_trip(state), state)
    assert same(decode_key(msgspec.json.decode(msgspec.json.encode(encode_key(key, ()))), "f"), key)


@pytest.mark.parametrize("make", [list, dict, OrderedDict], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("where", ["state", "list", "object"])
def test_a_container_that_holds_itself_is_refused(make: Any, where: str):
    """Cycles end in an error with a key, not in a RecursionError, also where they branch."""
    cycle: Any = make()
    if make is list:
        cycle += [cycle, cycle, torch.ones(1)]
    else:
        cycle.update(a=cycle, b=cycle, t=torch.ones(1))
    state = {"state": {"x": cycle}, "list": {"x": [cycle]}, "object": {"x": Thing(cycle)}}[where]
    if where != "object":  # whose state has no parameters of the user's
        with pytest.raises(UnsupportedValueError, match="holds itself"):
            parameter_names(state)
    with pytest.raises(UnsupportedValueError, match="holds itself") as caught:
        collect(state)
    assert caught.value.key is not None
    assert caught.value.key.startswith("x")


def test_values_have_a_limit_that_names_the_largest():
    """More than 8 MiB of values are refused; bytes and arrays are tensors and do not count."""
    small, large = "x" * 100, "y" * (MAX_VALUES_NBYTES // 2)
    values = [(("small",), small), (("a", "large"), large + "z"), (("large",), large)]
    with pytest.raises(UnsupportedValueError, match=r"largest is 'a\.large' with 4,194,307 bytes") as caught:
        encode_values(values)
    assert caught.value.key == "a.large"
    assert caught.value.type_name == "str"
    encode_values(values[:2])
    collected = collect({"b": bytes(MAX_VALUES_NBYTES + 1), "a": np.zeros(MAX_VALUES_NBYTES, dtype=np.uint8)})
    assert collected.values == []


def test_small_bytes_are_values_and_large_ones_tensors():
    """Up to 4 KiB stand in the manifest."""
    assert collect({"a": bytes(4096), "b": BytesIO(bytes(4096))}).entries == []
    collected = collect({"a": bytes(4097), "b": BytesIO(bytes(4097))})
    assert [entry[1:3] for entry in collected.entries] == [("U8", (4097,))] * 2
    assert collected.tree == {"a": ["bytes", 0], "b": ["BytesIO", 1, 0]}
    assert collected.copies.keys() == {0, 1}


def test_an_array_is_seen_as_it_lies_in_memory():
    """Arrays that torch can alias are not copied; no stream or array is changed or locked."""
    array, stream = np.arange(4.0), BytesIO(bytes(5000))
    collected = collect({"a": array, "s": stream})
    array[0] = 7
    assert collected.tensors[0][0] == 7
    assert collected.tree["a"] == ["ndarray", 0, "<f8"]
    stream.write(bytes(6000))  # not held by an export


def test_slow_objects_are_named():
    """An object whose ``state_dict()`` takes over a millisecond is named with its time."""

    class Slow(Thing):
        def state_dict(self) -> Any:
            import threading

            threading.Event().wait(0.01)
            return {}

    collected = collect({"a": {"slow": Slow(1)}, "quick": Thing(1)})
    assert collected.slow.keys() == {"a.slow"}
    assert collected.slow["a.slow"] >= 0.01


def test_objects_may_stand_in_lists_of_the_users():
    """A list may hold modules and optimizers; what has no tensors beside them stays a value."""
    first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    collected = collect({"nets": [first, second, {"n": 1}], "opts": (optimizer,)})
    tag, nodes = collected.tree["nets"]
    assert tag == "list"
    assert [nodes[0][0], nodes[1][0], nodes[2]] == ["module", "module", -3]
    assert collected.entries[2].segments == ("nets", "1", "weight")
    assert [found.path for found in collected.objects] == [("nets", "0"), ("nets", "1"), ("opts", "0")]
    assert collected.objects[2].read.param_names[0][2] == "nets.1.weight"  # type: ignore[union-attr]


def test_metadata_is_one_value():
    """The user's metadata is encoded like any value, and refused like any value."""
    metadata = {"note": "x", "when": (1, 2)}
    assert decode_all([msgspec.json.decode(encode_metadata(metadata))], "f") == [metadata]
    assert msgspec.json.decode(encode_metadata(None)) is None
    with pytest.raises(UnsupportedValueError) as caught:
        encode_metadata({"t": torch.ones(1)})
    assert caught.value.key == "metadata.t"


HOSTILE: list[Any] = [
    {"~Size": "x"},
    {"~Size": [1, "x"]},
    {"~dtype": "nonsense"},
    {"~dtype": ["float32"]},
    {"~device": "nowhere:x"},
    {"~device": 1.5},
    {"~numpy": ["<f8", "AAAA"]},
    {"~numpy": ["O", "AAAAAAAAAAA="]},
    {"~numpy": ["<f8", ""]},
    {"~numpy": "x"},
    {"~numpy": ["no dtype", "AAAA"]},
    {"~numpy": [["a", "b"], "AAAA"]},
    {"~unknown": 1},
]


@pytest.mark.parametrize("json", HOSTILE, ids=str)
def test_hostile_values_are_corrupt(json: Any):
    """JSON that no encoder made is a corrupt checkpoint, never another error."""
    with pytest.raises(CheckpointCorruptError):
        decode_all([json], "manifest.json")


@pytest.mark.parametrize(
    ("node", "tensor"),
    [
        (["ndarray", 0, "O"], torch.zeros(8, dtype=torch.uint8)),
        (["ndarray", 0, "nonsense"], torch.zeros(8, dtype=torch.uint8)),
        (["ndarray", 0, "<f8"], torch.zeros(7, dtype=torch.uint8)),
        (["ndarray", 0, "<f8"], torch.zeros((), dtype=torch.uint8)),
        (["ndarray", 0, "<f8"], torch.zeros(2, dtype=torch.float32)),
        (["ndarray", 0, 3], torch.zeros(2)),
        (["ndarray", 0], torch.zeros(2)),
        (["BytesIO", 0, -1], torch.zeros(2, dtype=torch.uint8)),
        (["BytesIO", 0, "x"], torch.zeros(2, dtype=torch.uint8)),
        (["bytes", 0], torch.zeros(2, dtype=torch.float32)),
        (["list", []], torch.zeros(2)),
    ],
    ids=str,
)
def test_hostile_blobs_are_value_errors(node: Any, tensor: torch.Tensor):
    """A node whose parts do not fit its tensor is a ValueError, which the reader calls corrupt."""
    with pytest.raises(ValueError, match=r"holds no|no node|larger dtype"):
        blob_value(node, tensor)
