"""Values on their way through JSON, and what tells two of them apart."""

from __future__ import annotations

import datetime
import math
import struct
from collections import Counter, OrderedDict, defaultdict
from io import BytesIO
from typing import Any

import msgspec

from aiockpt.format.values import decode_value, encode_value


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


class Hostile:
    """Its text is user's code that fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __repr__
