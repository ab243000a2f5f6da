"""Values that are no tensors, as JSON that keeps their types; no pickle.

None, bool, text, ints of 64 bits, finite floats, lists and dicts with text keys are plain JSON. Everything else is an
object with one key that begins with ``~``, such as ``{"~tuple": […]}``. Subclasses are refused, not flattened: a type
is taken only if it is exactly one of those below. An object that stands at two places comes back as two.
"""

from __future__ import annotations

import base64
import datetime
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from aiockpt.errors import CheckpointCorruptError, UnsupportedValueError
from aiockpt.format.names import Segments, dotted

__all__ = ["FACTORIES", "MAX_DEPTH", "MAX_ITEMS", "Decoders", "Encoder", "decode_value", "encode_value"]

Encoder = Callable[[object], "tuple[str, Any] | None"]
"""Gives (tag without ``~``, JSON) for a type that this module does not know, or None."""
Decoders = Mapping[str, Callable[[Any], Any]]
"""By tag without ``~``: makes the value; raises ValueError or TypeError on wrong JSON."""

MAX_DEPTH = 100
"""Of nested containers. One takes up to three levels of JSON and four calls, and Python's stack has 1,000 in all."""
MAX_ITEMS = 1 << 20
"""In all containers of a value, shared ones counted wherever they stand: at eight bytes each they fill the 8 MiB that
the values of a rank may take. Lists that hold the same list twice, and so on, would take for ever otherwise."""

FACTORIES: dict[str, Callable[[], Any]] = {"list": list, "dict": dict, "int": int, "float": float}
"""Default factories that a ``defaultdict`` may have (or None)."""


def encode_value(value: object, *, key: Segments, more: Encoder = lambda value: None) -> Any:
    """Return ``value`` as JSON.

    Args:
        value: None, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, ``OrderedDict``,
            ``Counter``, ``defaultdict``, ``BytesIO``, ``datetime``, ``Path``, nested as they like.
        key: Where it stands in the state, for the error.
        more: Encodes the types that need torch or numpy.

    Raises:
        UnsupportedValueError: Names the key and the type, also for a container that holds itself.
    """
    encoding = _Encoding(key, more)
    try:
        return encoding.encode(value)
    except RecursionError as exc:  # less than MAX_DEPTH, but the caller is deep in the stack already
        raise encoding.refuse(value, "it is nested too deep for what is left of Python's stack") from exc


class _Encoding:
    """Encodes one value; knows where it is and in which containers."""

    def __init__(self, key: Segments, more: Encoder) -> None:
        self._key = key
        self._more = more
        self._path: list[object] = []
        self._open: set[int] = set()
        self._left = MAX_ITEMS

    def encode(self, item: Any) -> Any:
        kind = type(item)
        if kind is bool or item is None:
            return item
        scalar = _SCALARS.get(kind)
        if scalar is not None:
            try:
                return scalar(item)
            except ValueError as exc:
                raise self.refuse(item, str(exc)) from exc
        container = _CONTAINERS.get(kind)
        if container is not None:
            self._enter(item)
            # Ten thousand names of parameters, in each save: with nothing to encode in any of them.
            json = list(item) if kind is list and _is_plain_text(item) else container(self, item)
            self._open.remove(id(item))
            return json
        found = self._more(item)
        if found is None:
            raise self.refuse(item, _why_not(kind))
        return {"~" + found[0]: found[1]}

    def _enter(self, item: Any) -> None:
        if id(item) in self._open:
            raise self.refuse(item, "it holds itself")
        if len(self._path) >= MAX_DEPTH:
            raise self.refuse(item, f"it is nested deeper than {MAX_DEPTH}")
        self._left -= len(item)
        if self._left < 0:
            raise self.refuse(
                item, f"its value has more than {MAX_ITEMS} items; bulk data belongs in tensors or arrays"
            )
        self._open.add(id(item))

    def items(self, items: Iterable[Any], segments: Iterable[object]) -> list[Any]:
        path, encode, encoded = self._path, self.encode, []
        path.append(None)
        for segment, item in zip(segments, items, strict=True):
            path[-1] = segment
            encoded.append(encode(item))
        path.pop()
        return encoded

    def pairs(self, item: Mapping[Any, Any]) -> list[Any]:
        keys = self.items(item, item)
        return [[key, value] for key, value in zip(keys, self.items(item.values(), item), strict=True)]

    def mapping(self, item: dict[Any, Any]) -> Any:
        plain = all(type(key) is str and _is_utf8(key) for key in item)
        if plain and not (len(item) == 1 and next(iter(item)).startswith("~")):
            return dict(zip(item, self.items(item.values(), item), strict=True))
        return {"~dict": self.pairs(item)}

    def members(self, item: Iterable[Any]) -> list[Any]:
        return sorted(self.items(item, item), key=repr)

    def default(self, item: defaultdict[Any, Any]) -> Any:
        factory = next((name for name, made in FACTORIES.items() if made is item.default_factory), None)
        if factory is None and item.default_factory is not None:
            raise self.refuse(item, f"its default factory is none of {', '.join(FACTORIES)}")
        return {"~defaultdict": [factory, self.pairs(item)]}

    def refuse(self, item: object, why: str) -> UnsupportedValueError:
        key = dotted((*self._key, *map(_segment, self._path[:_SHOWN_DEPTH])))
        if len(self._path) > _SHOWN_DEPTH:
            key += "…"
        name = f"{type(item).__module__}.{type(item).__qualname__}"
        return UnsupportedValueError(
            f"{key!r} cannot be saved: {name}",
            why=why,
            next="save it as plain values, give the object state_dict() and load_state_dict(), or leave it out",
            key=key,
            type_name=name,
        )


_SHOWN_DEPTH = 16


def _segment(key: object) -> str:
    if type(key) is str:
        return key
    # Not the repr of anything else: it is the user's code, may be long, and of a huge int there is none.
    short = key is None or type(key) in (bool, float) or (type(key) is int and abs(key) < 1 << 64)
    return repr(key) if short else f"<{type(key).__qualname__}>"


def _why_not(kind: type) -> str:
    for base in kind.__mro__[1:]:
        if base in _SCALARS or base in _CONTAINERS:
            return f"it is a subclass of {base.__qualname__}, and would come back as that"
    return "no type that a checkpoint keeps without pickle"


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _is_plain_text(items: list[Any]) -> bool:
    return all(type(item) is str for item in items) and "".join(items).isascii()


def _text(text: str) -> Any:
    if _is_utf8(text):
        return text
    # Lone surrogates, as in file names that are no UTF-8.
    return {"~str": base64.b64encode(text.encode("utf-8", "surrogatepass")).decode()}


def _datetime(moment: datetime.datetime) -> Any:
    zone, name = moment.tzinfo, None
    if zone is not None:
        if type(zone) is not datetime.timezone:
            raise ValueError("its time zone is no fixed offset; use datetime.timezone")
        if zone.tzname(None) != datetime.timezone(zone.utcoffset(None)).tzname(None):
            name = _text(zone.tzname(None))
    return {"~datetime": [moment.isoformat(), moment.fold, name]}


def _bytesio(stream: BytesIO) -> Any:
    return {"~BytesIO": [base64.b64encode(stream.getvalue()).decode(), stream.tell()]}


_SCALARS: dict[type, Callable[[Any], Any]] = {
    str: _text,
    int: lambda item: item if -(1 << 63) <= item < 1 << 64 else {"~int": hex(item)},
    float: lambda item: item if math.isfinite(item) else {"~float": repr(item)},
    complex: lambda item: {"~complex": [repr(item.real), repr(item.imag)]},
    bytes: lambda item: {"~bytes": base64.b64encode(item).decode()},
    BytesIO: _bytesio,
    datetime.datetime: _datetime,
    type(Path()): lambda item: {"~Path": _text(str(item))},
}
"""By exact type."""

_CONTAINERS: dict[type, Callable[[_Encoding, Any], Any]] = {
    list: lambda encoding, item: encoding.items(item, range(len(item))),
    tuple: lambda encoding, item: {"~tuple": encoding.items(item, range(len(item)))},
    dict: _Encoding.mapping,
    OrderedDict: lambda encoding, item: {"~OrderedDict": encoding.pairs(item)},
    Counter: lambda encoding, item: {"~Counter": encoding.pairs(item)},
    defaultdict: _Encoding.default,
    set: lambda encoding, item: {"~set": encoding.members(item)},
    frozenset: lambda encoding, item: {"~frozenset": encoding.members(item)},
}
"""By exact type."""


def decode_value(json: Any, *, file: str, more: Decoders | None = None) -> Any:
    """Return the value that ``encode_value`` made ``json`` of.

    Raises:
        CheckpointCorruptError: The JSON is none that ``encode_value`` makes, or needs a decoder that is not given.
    """
    try:
        return _Decoding({**_DECODERS, **(more or {})}).decode(json)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as exc:
        raise CheckpointCorruptError(
            f"a value in {file} cannot be read", why=str(exc), next="restore another step", file=file
        ) from exc


class _Decoding:
    """Decodes one value; knows how deep it is."""

    def __init__(self, known: Decoders) -> None:
        self._known = known
        self._depth = 0

    def decode(self, json: Any) -> Any:
        if not isinstance(json, (list, dict)):
            return json
        self._depth += 1
        if self._depth > MAX_DEPTH + 1:  # a tagged scalar in the innermost container
            raise ValueError(f"it is nested deeper than {MAX_DEPTH}")
        value = self._container(json)
        self._depth -= 1
        return value

    def _container(self, json: list[Any] | dict[str, Any]) -> Any:
        decode = self.decode
        if isinstance(json, list):
            return [decode(item) for item in json]
        tag = next(iter(json)) if len(json) == 1 else ""
        if not tag.startswith("~"):
            return {key: decode(item) for key, item in json.items()}
        body = json[tag]
        match tag[1:]:
            case "tuple":
                return tuple([decode(item) for item in _need(body, list)])
            case "set":
                return {decode(item) for item in _need(body, list)}
            case "frozenset":
                return frozenset([decode(item) for item in _need(body, list)])
            case "dict":
                return dict(self._pairs(body))
            case "OrderedDict":
                return OrderedDict(self._pairs(body))
            case "Counter":
                return Counter(dict(self._pairs(body)))
            case "defaultdict":
                name, items = _need(body, list, 2)
                return defaultdict(None if name is None else FACTORIES[name], self._pairs(items))
            case name if name in self._known:
                return self._known[name](body)
        raise ValueError(f"unknown type {tag[:40]!r}")

    def _pairs(self, json: Any) -> list[tuple[Any, Any]]:
        pairs = [_need(pair, list, 2) for pair in _need(json, list)]
        return [(self.decode(key), self.decode(item)) for key, item in pairs]


def _need(json: Any, kind: type[Any], length: int | None = None) -> Any:
    if type(json) is not kind or (length is not None and len(json) != length):
        raise ValueError(f"a {type(json).__name__} is not what its tag needs")
    return json


def _decode_bytes(json: Any) -> bytes:
    return base64.b64decode(_need(json, str), validate=True)


def _decode_text(json: Any) -> str:
    if type(json) is dict and len(json) == 1:
        return _decode_bytes(json["~str"]).decode("utf-8", "surrogatepass")
    return str(_need(json, str))


def _decode_bytesio(json: Any) -> BytesIO:
    data, position = _need(json, list, 2)
    stream = BytesIO(_decode_bytes(data))
    stream.seek(_need(position, int))
    return stream


def _decode_datetime(json: Any) -> datetime.datetime:
    text, fold, name = _need(json, list, 3)
    moment = datetime.datetime.fromisoformat(_need(text, str)).replace(fold=_need(fold, int))
    if name is None:
        return moment
    offset = moment.utcoffset()
    if offset is None:
        raise ValueError("a time zone has a name and no offset")
    return moment.replace(tzinfo=datetime.timezone(offset, _decode_text(name)))


_DECODERS: Decoders = {
    "int": lambda json: int(_need(json, str), 16),
    "float": lambda json: {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[_need(json, str)],
    "complex": lambda json: complex(*(float(_need(part, str)) for part in _need(json, list, 2))),
    "str": lambda json: _decode_bytes(json).decode("utf-8", "surrogatepass"),
    "bytes": _decode_bytes,
    "BytesIO": _decode_bytesio,
    "datetime": _decode_datetime,
    "Path": lambda json: Path(_decode_text(json)),
}
"""By tag without ``~``; the containers stand in ``_Decoding``."""
