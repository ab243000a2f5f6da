"""Two checkpoints side by side: what came, what went, what has another form, which values differ; no bytes are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from aiockpt.cli.contents import form_of, leaves_of
from aiockpt.cli.value_text import items_of
from aiockpt.format.manifest import Manifest
from aiockpt.format.names import Segments, dotted
from aiockpt.format.tree import Node, is_blob, value_number
from aiockpt.restoring.selection import Selection

__all__ = ["Comparison", "Difference", "Form", "FormChange", "Pair", "ValueChange", "compare"]


class Form(msgspec.Struct, frozen=True, kw_only=True):
    """Something that only one of the two has."""

    name: str
    form: str
    """Kind, dtype and shape of a tensor; ``value`` where it is one."""


class FormChange(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is not the same kind of thing in both."""

    name: str
    a: str
    b: str


class ValueChange(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A value, or a part of one, that is not the same in both."""

    name: str
    a: Any = msgspec.UNSET
    """As the file format encodes it; absent where only the other has it."""
    b: Any = msgspec.UNSET


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Two tensors of one name that do not have the same bytes.

    ``max_abs`` and ``relative`` leave elements out that are NaN; an infinite one is null in JSON.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    unequal: int
    """Elements that differ; NaN equals NaN, and 0.0 equals -0.0."""
    max_abs: float
    """The largest ``|a - b|``."""
    relative: float
    """``‖a - b‖ / ‖a‖``, 2-norms over what is finite in both."""
    nan_a: int
    nan_b: int
    a: Any = None
    """The element, where there is one only."""
    b: Any = None


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor of the same form in both; entry numbers."""

    name: str
    kind: str
    """``tensor``, or how the value is tagged that is stored as one."""
    a: int
    b: int


@dataclass(slots=True)
class Comparison:
    """What two manifests say."""

    pairs: list[Pair] = field(default_factory=list)
    added: list[Form] = field(default_factory=list)
    removed: list[Form] = field(default_factory=list)
    changed: list[FormChange] = field(default_factory=list)
    values: list[ValueChange] = field(default_factory=list)
    equal_values: int = 0
    metadata: list[ValueChange] = field(default_factory=list)


def compare(a: Manifest, b: Manifest, names: Selection) -> Comparison:
    """Compare what is selected, in the order of ``a``; metadata only where everything is."""
    found = Comparison()
    left, right = dict(leaves_of(a, names)), dict(leaves_of(b, names))
    met: set[tuple[int, int]] = set()
    for path, leaf in left.items():
        if path not in right:
            found.removed.append(Form(name=dotted(path), form=_form(a, leaf)))
            continue
        other = right[path]
        if _is_value(leaf) and _is_value(other):
            changes = list(_changes(dotted(path), a.values[value_number(leaf)], b.values[value_number(other)]))
            found.values += changes
            found.equal_values += not changes
        else:
            _compare_tensors(found, path, (a, leaf), (b, other), met)
    found.added = [Form(name=dotted(path), form=_form(b, leaf)) for path, leaf in right.items() if path not in left]
    if names.everything:
        found.metadata = list(_changes("", a.metadata, b.metadata))
    return found


def _compare_tensors(
    found: Comparison, path: Segments, a: tuple[Manifest, Node], b: tuple[Manifest, Node], met: set[tuple[int, int]]
) -> None:
    forms = _form(*a), _form(*b)
    if forms[0] != forms[1]:
        found.changed.append(FormChange(name=dotted(path), a=forms[0], b=forms[1]))
        return
    leaf, other = a[1], b[1]
    entries = (leaf[1], other[1]) if is_blob(leaf) else (leaf, other)
    if entries not in met:  # tied tensors are compared once
        met.add(entries)
        found.pairs.append(Pair(dotted(path), leaf[0] if is_blob(leaf) else "tensor", *entries))


def _is_value(leaf: Node) -> bool:
    return isinstance(leaf, int) and leaf < 0


def _form(manifest: Manifest, leaf: Node) -> str:
    if _is_value(leaf):
        return "value"
    dtype, shape = form_of(manifest, leaf[1] if is_blob(leaf) else leaf)
    if not is_blob(leaf):
        return f"{dtype} {list(shape)}"
    tag, _, *rest = leaf  # an array's dtype, a stream's position
    kind = {"ndarray": "numpy"}.get(tag, tag)
    return " ".join((kind, *map(str, rest), str(list(shape))))


def _changes(name: str, a: Any, b: Any) -> Iterator[ValueChange]:
    """Yield the smallest parts of a value that differ and have a name."""
    if msgspec.json.encode(a) == msgspec.json.encode(b):  # as ==, but 1 is no True
        return
    left, right = items_of(a), items_of(b)
    if left is None or right is None or not _is_walked(a, b):
        yield ValueChange(name=name, a=a, b=b)
        return
    others = dict(right)
    for key, item in left:
        inner = f"{name}.{key}" if name else key
        if key in others:
            yield from _changes(inner, item, others.pop(key))
        else:
            yield ValueChange(name=inner, a=item)
    for key, item in others.items():
        yield ValueChange(name=f"{name}.{key}" if name else key, b=item)


def _is_walked(a: Any, b: Any) -> bool:
    """Tell whether two containers are looked into: of one kind, and sequences only where they hold containers."""
    if _kind(a) != _kind(b):
        return False
    if _kind(a) not in ("list", "~tuple"):
        return True
    items = a if isinstance(a, list) else a["~tuple"]
    others = b if isinstance(b, list) else b["~tuple"]
    return len(items) == len(others) and any(isinstance(item, (list, dict)) for item in items)


def _kind(container: Any) -> str:
    if isinstance(container, list):
        return "list"
    tag = str(next(iter(container), ""))
    return tag if len(container) == 1 and tag.startswith("~") else "dict"
