"""The shape of a state as JSON: which containers hold which tensors and values.

A node is one of

- an int ``n >= 0``: tensor entry ``n``; an int ``n < 0``: value number ``-n - 1``;
- an object: a plain ``dict`` with text keys, in order;
- an array that begins with a tag:
  ``["list", [node, …]]``, ``["tuple", [node, …]]``,
  ``["dict" | "OrderedDict" | "defaultdict" | "defaultdict:list" | …, [[key, node], …]]`` where keys are encoded
  values, and the part behind the colon is the default factory's name,
  ``["module", {name: node, …}, value | null]`` with the module's ``_metadata``,
  ``["ndarray", n, dtype]``, ``["bytes", n]``, ``["BytesIO", n, position]`` for what is stored as a
  tensor and is none.

The same entry number may stand at several places: tied tensors are stored once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import msgspec

from aiockpt.format.names import Segments
from aiockpt.format.values import FACTORIES

__all__ = [
    "BLOBS",
    "MAPPINGS",
    "Node",
    "check_tree",
    "children",
    "is_blob",
    "key_text",
    "renumber",
    "value_node",
    "value_number",
    "walk",
]

Node = Any
"""JSON as described above."""

BLOBS = frozenset({"ndarray", "bytes", "BytesIO"})
"""Tags of leaves that are stored as a tensor."""
MAPPINGS = frozenset({"dict", "OrderedDict", "defaultdict", *(f"defaultdict:{name}" for name in FACTORIES)})
"""Tags of mappings that are no JSON object, because of their type or of their keys."""


def value_node(number: int) -> int:
    """Return the node of value ``number``."""
    return -number - 1


def value_number(node: int) -> int:
    """Return the number of the value that a negative node stands for."""
    return -node - 1


def is_blob(node: Node) -> bool:
    """Tell whether the node is a leaf that is stored as a tensor and is none."""
    return isinstance(node, list) and node[0] in BLOBS


def children(node: Node) -> Iterator[tuple[str, Node]]:
    """Yield (segment, child) of a container, in its order."""
    if isinstance(node, dict):
        yield from node.items()
    elif node[0] in ("list", "tuple"):
        for index, child in enumerate(node[1]):
            yield str(index), child
    elif node[0] == "module":
        yield from node[1].items()
    else:
        for key, child in node[1]:
            yield key_text(key), child


def key_text(key: Any) -> str:
    """Return the segment of an encoded mapping key: text as it is, all else as compact JSON."""
    return key if isinstance(key, str) else msgspec.json.encode(key).decode()


def walk(node: Node, path: Segments = ()) -> Iterator[tuple[Segments, Node]]:
    """Yield (path, leaf) for every tensor, value and blob below ``node``; modules' ``_metadata`` aside."""
    if isinstance(node, int) or is_blob(node):
        yield path, node
        return
    for segment, child in children(node):
        yield from walk(child, (*path, segment))


def renumber(node: Node, number: Callable[[int], int]) -> Node:
    """Return the tree with every tensor entry's number replaced."""
    if isinstance(node, int):
        return number(node) if node >= 0 else node
    if isinstance(node, dict):
        return {key: renumber(child, number) for key, child in node.items()}
    tag = node[0]
    if tag in BLOBS:
        return [tag, number(node[1]), *node[2:]]
    if tag in ("list", "tuple"):
        return [tag, [renumber(child, number) for child in node[1]]]
    if tag == "module":
        return [tag, renumber(node[1], number), node[2]]
    return [tag, [[key, renumber(child, number)] for key, child in node[1]]]


def check_tree(node: Node, *, entries: int, values: int) -> None:
    """Check that JSON from a file is a tree whose numbers are below ``entries`` and ``values``.

    Raises:
        ValueError: It is not; the other functions here may be given any tree that passed.
        RecursionError: It is nested deeper than any that was written.
    """

    def check(node: Node) -> None:
        match node:
            case int() if _is_number(node, -values, entries):
                return
            case dict():
                parts = list(node.values())
            case ["list" | "tuple", list(parts)]:
                pass
            case ["module", dict(items), metadata]:
                parts = list(items.values())
                if metadata is not None and not _is_number(metadata, -values, 0):
                    raise ValueError("a module's metadata in its tree is no value")
            case [str(tag), list(pairs)] if tag in MAPPINGS and all(_is_pair(pair) for pair in pairs):
                parts = [part for _, part in pairs]
            case ["ndarray", number, str()] | ["bytes", number] if _is_number(number, 0, entries):
                return
            case ["BytesIO", number, position] if _is_number(number, 0, entries) and _is_number(position, 0, 1 << 63):
                return
            case _:
                raise ValueError(f"its tree has a node that is none: {node!r:.80}")
        for part in parts:
            check(part)

    check(node)


def _is_number(node: Node, start: int, stop: int) -> bool:
    return type(node) is int and start <= node < stop  # a bool is an int


def _is_pair(pair: Node) -> TypeGuard[list[Any]]:
    return isinstance(pair, list) and len(pair) == 2
