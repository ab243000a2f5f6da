"""Values of a checkpoint as text for people, from their JSON: no torch, no numpy, nothing is built.

The JSON may be anybody's: what is none of ``format.values`` is shown as it stands, and text is cut where room ends.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from aiockpt.cli.screen import printable, size_text

__all__ = ["items_of", "value_text"]

_DEEPEST = 8
_MAPPINGS = ("dict", "OrderedDict", "Counter")
_NUMPY = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"} | {
    "f2": "e",
    "f4": "f",
    "f8": "d",
}
"""Numpy's codes behind the byte order → those of ``struct``."""


def items_of(encoded: Any) -> list[tuple[str, Any]] | None:
    """Return (key as text, encoded item) of a sequence or mapping; None where the value is neither."""
    if isinstance(encoded, list):
        return [(str(index), item) for index, item in enumerate(encoded)]
    if not isinstance(encoded, dict):
        return None
    tag, body = _tagged(encoded)
    if not tag:
        return [(printable(key), item) for key, item in encoded.items()]
    if tag == "tuple" and isinstance(body, list):
        return items_of(body)
    pairs = body[1] if tag == "defaultdict" and isinstance(body, list) and len(body) == 2 else body
    if tag in (*_MAPPINGS, "defaultdict") and isinstance(pairs, list) and all(map(_is_pair, pairs)):
        return [(printable(key) if isinstance(key, str) else value_text(key), item) for key, item in pairs]
    return None


def value_text(encoded: Any, room: int = 60) -> str:
    """Return a value as Python would show it, in about ``room`` characters.

    Args:
        encoded: As ``format.values`` has it.
        room: A longer value is cut, and says how much it has; it may take a few characters more all the same.
    """
    return _text(encoded, room, _DEEPEST)


def _text(encoded: Any, room: int, levels: int) -> str:
    if isinstance(encoded, str):
        return _quoted(encoded, room)
    if isinstance(encoded, list):
        return _joined("[]", _plain(encoded), len(encoded), room, levels)
    if not isinstance(encoded, dict):
        return repr(encoded)
    tag, body = _tagged(encoded)
    if not tag:
        return _joined("{}", _keyed(encoded.items()), len(encoded), room, levels)
    try:
        return _tagged_text(tag, body, room, levels)
    except (ValueError, TypeError, LookupError, struct.error, OverflowError):  # none of ours
        return _cut(printable(msgspec.json.encode(encoded).decode()), room)


def _tagged(encoded: dict[str, Any]) -> tuple[str, Any]:
    """Return (tag without ``~``, body) of a tagged value; the tag is empty where it is a plain dict."""
    if len(encoded) == 1:
        ((tag, body),) = encoded.items()
        if tag.startswith("~"):
            return tag[1:], body
    return "", None


def _tagged_text(tag: str, body: Any, room: int, levels: int) -> str:
    match tag, body:
        case "tuple", list():
            return _joined("()", _plain(body), len(body), room, levels)
        case "set", []:
            return "set()"
        case "set" | "frozenset", list():
            return ("" if tag == "set" else tag) + _joined("{}", _plain(body), len(body), room, levels)
        case (("dict" | "OrderedDict" | "Counter"), list()):
            return ("" if tag == "dict" else tag) + _joined("{}", _keyed(body), len(body), room, levels)
        case "defaultdict", [_, list(pairs)]:
            return tag + _joined("{}", _keyed(pairs), len(pairs), room, levels)
        case "int", str():
            # Of a number with thousands of digits Python makes no text, and nobody reads them.
            return str(int(body, 16)) if len(body) <= 64 else _cut(body, room)
        case "float", str():
            return printable(body)
        case "complex", [str(real), str(imag)]:
            return printable(f"{real}{'' if imag.startswith('-') else '+'}{imag}j")
        case "str", str():
            return _quoted(base64.b64decode(body).decode("utf-8", "surrogatepass"), room)
        case "bytes", str():
            data = base64.b64decode(body)
            return repr(data) if 4 * len(data) <= room else f"bytes, {size_text(len(data))}"
        case "BytesIO", [str(data), int()]:
            return f"BytesIO, {size_text(len(base64.b64decode(data)))}"
        case "datetime", [str(moment), *_]:
            return printable(moment)
        case "Path", _:
            return f"Path({_text(body, room, levels)})"
        case (("dtype" | "device"), str()):
            return printable(f"torch.dtype {body}" if tag == "dtype" else f"device {body}")
        case "Size", list():
            return "Size" + _joined("[]", _plain(body), len(body), room, levels)
        case "numpy", [str(code), str(data)]:
            return _numpy_text(code, base64.b64decode(data))
    raise ValueError(f"unknown type {tag!r}")


def _numpy_text(code: str, data: bytes) -> str:
    order, kind = (code[0].replace("|", "<"), code[1:]) if code else ("", "")
    if kind not in _NUMPY or order not in "<>":
        return printable(f"numpy {code}")
    (value,) = struct.unpack(order + _NUMPY[kind], data)
    return f"{value!r}"


def _plain(items: list[Any]) -> Iterator[tuple[str, Any]]:
    for item in items:
        yield "", item


def _keyed(pairs: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for key, item in pairs:
        yield f"{printable(key) if isinstance(key, str) else value_text(key)}: ", item


def _joined(brackets: str, items: Iterator[tuple[str, Any]], count: int, room: int, levels: int) -> str:
    """Return items in brackets, those that there is room for, and how many there are where some are left out.

    Args:
        brackets: The two.
        items: (what stands before it, item) each.
        count: How many there are.
        room: For all.
        levels: Of nesting that may be shown.
    """
    opening, closing = brackets[0], brackets[1]
    if count and not levels:
        return f"{opening}… {count} items{closing}"
    parts: list[str] = []
    rest = f"… {count} items" if count > 1 else ""
    left = room - 2
    for key, item in items:
        is_last = len(parts) + 1 == count
        # Room is kept for what is said of the rest, so that a long item gives way and not the items behind it.
        part = key + _text(item, left - len(key) - (0 if is_last else len(rest) + 2), levels - 1)
        if len(part) > left - (0 if is_last else len(rest) + 2) and rest:
            return f"{opening}{''.join(f'{part}, ' for part in parts)}{rest}{closing}"
        left -= len(part) + 2
        parts.append(part)
    comma = "," if brackets == "()" and len(parts) == 1 else ""
    return f"{opening}{', '.join(parts)}{comma}{closing}"


def _quoted(text: str, room: int) -> str:
    shown = repr(text) if len(text) <= room else ""
    if shown and len(shown) <= max(room, 8):
        return shown
    rest = f"… {len(text)} characters"
    return f"{text[: max(room - len(rest) - 2, 8)]!r}{rest}"


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: max(room, 8)]}…"


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2
