"""Values that would not come back as they are: refused by name."""

from __future__ import annotations

import collections
import datetime
import enum
import zoneinfo
from collections import Counter, defaultdict
from decimal import Decimal
from fractions import Fraction
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.values import encode_value
from tests.format.valuing import Hostile


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
