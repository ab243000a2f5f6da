"""Values of a state in the types that ``torch.load(weights_only=True)`` permits."""

from __future__ import annotations

import datetime
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.names import Segments, dotted
from aiockpt.state.values import key_segment

__all__ = ["Converting"]

_MOST_INT_BITS = 255 * 8 - 1
"""Pickle's LONG1 holds no more, and the loader of weights takes no other long int."""
_AS_THEY_ARE = frozenset(
    {type(None), bool, float, complex, str, bytes, torch.Size, torch.dtype, torch.device, torch.Tensor}
)

_THE_SAME = "two of its {} are the same in the types that such a file may hold"


class Converting:
    """Rebuilds containers, and turns what is not permitted into what comes nearest."""

    def __init__(self) -> None:
        self.converted: dict[str, str] = {}
        """By dotted name: what became of what."""

    def convert(self, value: Any, path: Segments) -> Any:
        """Return ``value`` in permitted types.

        Raises:
            UnsupportedValueError: It has none; names its key.
        """
        kind = type(value)
        if kind in _AS_THEY_ARE:
            return value
        if kind is int and value.bit_length() <= _MOST_INT_BITS:
            return value
        if kind is list:
            return [self.convert(item, (*path, str(index))) for index, item in enumerate(value)]
        if kind is tuple:
            return tuple([self.convert(item, (*path, str(index))) for index, item in enumerate(value)])
        if isinstance(value, dict):
            return self._mapping(value, path)
        if kind is set or kind is frozenset:
            return self._set(value, path)
        return self._scalar(value, path)

    def _set(self, value: set[Any] | frozenset[Any], path: Segments) -> set[Any]:
        if type(value) is frozenset:
            self._note(path, "a frozenset as a set")
        made = set(self._members(value, path))
        if len(made) < len(value):
            raise _refuse(value, path, _THE_SAME.format("members"))
        return made

    def _mapping(self, value: Mapping[Any, Any], path: Segments) -> Any:
        pairs = [
            (self._hashable(key, path), self.convert(item, (*path, key_segment(key, path))))
            for key, item in value.items()
        ]
        kind = type(value)
        if kind is defaultdict:
            self._note(path, "a defaultdict as a dict")
        made: dict[Any, Any] = {OrderedDict: OrderedDict, Counter: Counter}.get(kind, dict)(dict(pairs))
        if len(made) < len(pairs):
            raise _refuse(value, path, _THE_SAME.format("keys"))
        return made

    def _members(self, value: Iterable[Any], path: Segments) -> list[Any]:
        return [self._hashable(item, path) for item in value]

    def _hashable(self, value: Any, path: Segments) -> Any:
        """Return a key or a set's member, which must stay hashable."""
        if type(value) is tuple:
            return tuple(self._members(value, path))
        if type(value) is frozenset:
            self._note(path, "a frozenset as a tuple")
            return tuple(sorted(self._members(value, path), key=repr))
        return self.convert(value, path)

    def _scalar(self, value: Any, path: Segments) -> Any:
        kind = type(value)
        if kind is BytesIO:
            self._note(path, "a BytesIO as bytes")
            return value.getvalue()
        if kind is datetime.datetime:
            self._note(path, "a datetime as text")
            return value.isoformat()
        if isinstance(value, Path):
            self._note(path, "a Path as text")
            return str(value)
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.generic):
            self._note(path, f"a numpy.{kind.__name__} as Python's own")
            plain = value.item()
            if isinstance(plain, numpy.generic):  # long doubles, which Python has no type for
                plain = complex(plain) if isinstance(plain, numpy.complexfloating) else float(plain)
            return self.convert(plain, path) if type(plain) in _PYTHONS_OWN else str(value)
        raise _refuse(value, path, "torch.load(weights_only=True) permits no such value")

    def _note(self, path: Segments, what: str) -> None:
        self.converted[dotted(path)] = what


_PYTHONS_OWN = frozenset({bool, int, float, complex, str, bytes})


def _refuse(value: object, path: Segments, why: str) -> UnsupportedValueError:
    key = dotted(path)
    return UnsupportedValueError(
        f"{key!r} cannot be exported to such a file: {type(value).__qualname__}",
        why=why,
        next="export a part without it (--part, --include), or read it with aiockpt.load",
        key=key,
        type_name=type(value).__qualname__,
    )
