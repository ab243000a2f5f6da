"""Values that are no tensors, as JSON that keeps their types; no pickle.

None, bool, text, ints of 64 bits, finite floats, lists and dicts with text keys are plain JSON. Everything else is an
object with one key that begins with ``~``, such as ``{"~tuple": […]}``. Subclasses are refused, not flattened: a type
is taken only if it is exactly one of those below.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path, PosixPath
from typing import Any

from aiockpt.errors import CheckpointCorruptError, UnsupportedValueError
from aiockpt.format.names import Segments, dotted

__all__ = ["FACTORIES", "MAX_DEPTH", "Decoders", "Encoder", "decode_value", "encode_value"]

Encoder = Callable[[object], "tuple[str, Any] | None"]
"""Gives (tag without ``~``, JSON) for a type that this module does not know, or None."""
Decoders = Mapping[str, Callable[[Any], Any]]
"""By tag without ``~``: makes the value; raises ValueError or TypeError on wrong JSON."""

MAX_DEPTH = 200
"""Of nested containers; a hostile manifest must not overflow the stack."""

FACTORIES: dict[str, Callable[[], Any]] = {"list": list, "dict": dict, "int": int, "float": float}
"""Default factories that a ``defaultdict`` may have (or None)."""


def encode_value(value: object, *, key: Segments, more: Encoder = lambda value: None) -> Any:
    """Return ``value`` as JSON.

    Args:
        value: Any value that DESIGN's list of values has.
        key: Where it stands in the state, for the error.
        more: Encodes the types that need torch or numpy.

    Raises:
        UnsupportedValueError: Names the key and the type, also for a container that holds itself.
    """

    def refuse(item: object, path: Segments, why: str) -> UnsupportedValueError:
        name = f"{type(item).__module__}.{type(item).__qualname__}"
        return UnsupportedValueError(
            f"{dotted(path)!r} cannot be saved: {name}",
            why=why,
            next="save it as plain values, give the object state_dict() and load_state_dict(), or leave it out",
            key=dotted(path),
            type_name=name,
        )

    def pairs(mapping: Mapping[Any, Any], path: Segments, depth: int) -> list[Any]:
        return [[encode(k, (*path, repr(k)), depth), encode(v, (*path, str(k)), depth)] for k, v in mapping.items()]

    def encode(item: object, path: Segments, depth: int) -> Any:
        if item is None or item is True or item is False:
            return item
        kind = type(item)
        if kind is str:
            return _encode_text(item)  # type: ignore[arg-type]
        if kind is int:
            return item if -(1 << 63) <= item < 1 << 64 else {"~int": hex(item)}  # type: ignore[operator, arg-type]
        if kind is float:
            return item if math.isfinite(item) else {"~float": repr(item)}  # type: ignore[arg-type]
        if depth > MAX_DEPTH:
            raise refuse(item, path, f"it is nested deeper than {MAX_DEPTH}, or holds itself")
        match item:
            case list() if kind is list:
                return [encode(v, (*path, str(i)), depth + 1) for i, v in enumerate(item)]
            case tuple() if kind is tuple:
                return {"~tuple": [encode(v, (*path, str(i)), depth + 1) for i, v in enumerate(item)]}
            case dict() if kind is dict:
                return _encode_dict(item, pairs, encode, path, depth + 1)
            case Counter() if kind is Counter:
                return {"~Counter": pairs(item, path, depth + 1)}
            case OrderedDict() if kind is OrderedDict:
                return {"~OrderedDict": pairs(item, path, depth + 1)}
            case defaultdict() if kind is defaultdict:
                factory = next((name for name, made in FACTORIES.items() if made is item.default_factory), None)
                if factory is None and item.default_factory is not None:
                    raise refuse(item, path, "its default factory is none of list, dict, int, float")
                return {"~defaultdict": [factory, pairs(item, path, depth + 1)]}
            case set() | frozenset() if kind in (set, frozenset):
                members = [encode(v, (*path, repr(v)), depth + 1) for v in item]
                return {f"~{kind.__name__}": sorted(members, key=repr)}
            case complex() if kind is complex:
                return {"~complex": [repr(item.real), repr(item.imag)]}
            case bytes() if kind is bytes:
                return {"~bytes": base64.b64encode(item).decode()}
            case BytesIO() if kind is BytesIO:
                return {"~BytesIO": [base64.b64encode(item.getvalue()).decode(), item.tell()]}
            case datetime.datetime() if kind is datetime.datetime:
                if item.tzinfo is not None and type(item.tzinfo) is not datetime.timezone:
                    raise refuse(item, path, "its time zone is no fixed offset; use datetime.timezone")
                return {"~datetime": [item.isoformat(), item.fold]}
            case PosixPath():
                return {"~Path": str(item)}
        found = more(item)
        if found is None:
            raise refuse(item, path, "no type that a checkpoint keeps without pickle")
        return {"~" + found[0]: found[1]}

    return encode(value, key, 0)


def _encode_text(text: str) -> Any:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates, as in file names that are no UTF-8
        return {"~str": base64.b64encode(text.encode("utf-8", "surrogatepass")).decode()}
    return str(text)


def _encode_dict(item: dict[Any, Any], pairs: Any, encode: Any, path: Segments, depth: int) -> Any:
    plain = all(type(k) is str and not isinstance(_encode_text(k), dict) for k in item)
    if plain and not (len(item) == 1 and next(iter(item)).startswith("~")):
        return {k: encode(v, (*path, k), depth) for k, v in item.items()}
    return {"~dict": pairs(item, path, depth)}


def _need(json: Any, kind: type[Any], length: int | None = None) -> Any:
    if type(json) is not kind or (length is not None and len(json) != length):
        raise ValueError(f"{json!r:.60} is not the {kind.__name__} that its tag needs")
    return json


def _b64(json: Any) -> bytes:
    return base64.b64decode(_need(json, str), validate=True)


def _bytesio(json: Any) -> BytesIO:
    data, position = _need(json, list, 2)
    stream = BytesIO(_b64(data))
    stream.seek(_need(position, int))
    return stream


_SCALARS: dict[str, Callable[[Any], Any]] = {
    "int": lambda json: int(_need(json, str), 16),
    "float": lambda json: {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[_need(json, str)],
    "complex": lambda json: complex(*(float(part) for part in _need(json, list, 2))),
    "str": lambda json: _b64(json).decode("utf-8", "surrogatepass"),
    "bytes": _b64,
    "BytesIO": _bytesio,
    "datetime": lambda json: datetime.datetime.fromisoformat(_need(json, list, 2)[0]).replace(fold=json[1]),
    "Path": lambda json: Path(_need(json, str)),
}


def decode_value(json: Any, *, file: str, more: Decoders | None = None) -> Any:
    """Return the value that ``encode_value`` made ``json`` of.

    Raises:
        CheckpointCorruptError: The JSON is none that ``encode_value`` makes, or needs a decoder that is not given.
    """
    known = {**_SCALARS, **(more or {})}

    def pairs(items: Any, depth: int) -> list[tuple[Any, Any]]:
        return [(decode(k, depth), decode(v, depth)) for k, v in (_need(pair, list, 2) for pair in _need(items, list))]

    def decode(item: Any, depth: int) -> Any:
        if depth > MAX_DEPTH + 1:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        if isinstance(item, list):
            return [decode(v, depth + 1) for v in item]
        if not isinstance(item, dict):
            return item
        tag = next(iter(item)) if len(item) == 1 else ""
        if not tag.startswith("~"):
            return {k: decode(v, depth + 1) for k, v in item.items()}
        body = item[tag]
        match tag[1:]:
            case "tuple":
                return tuple(decode(v, depth + 1) for v in _need(body, list))
            case "set":
                return {decode(v, depth + 1) for v in _need(body, list)}
            case "frozenset":
                return frozenset(decode(v, depth + 1) for v in _need(body, list))
            case "dict":
                return dict(pairs(body, depth + 1))
            case "OrderedDict":
                return OrderedDict(pairs(body, depth + 1))
            case "Counter":
                return Counter(dict(pairs(body, depth + 1)))
            case "defaultdict":
                name, items = _need(body, list, 2)
                return defaultdict(None if name is None else FACTORIES[name], pairs(items, depth + 1))
            case name if name in known:
                return known[name](body)
        raise ValueError(f"unknown type {tag[:40]!r}")

    try:
        return decode(json, 0)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, binascii.Error) as exc:
        raise CheckpointCorruptError(
            f"a value in {file} cannot be read", why=str(exc), next="restore another step", file=file
        ) from exc
