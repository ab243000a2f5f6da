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
  tensor and is none,
  ``["per_rank", node]`` for what is each rank's own, in the tree of one rank; in a tree for several
  ``["own", key]`` stands in its place, and ``Manifest.own_plans`` have the nodes.

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
    "OWN",
    "PER_RANK",
    "Node",
    "check_tree",
    "children",
    "fill_places",
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


PER_RANK = "per_rank"
OWN = "own"


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
    elif node[0] == PER_RANK:
        if not isinstance(node[1], int) and not is_blob(node[1]):
            yield from children(node[1])
    elif node[0] == OWN:
        return
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
    if isinstance(node, list) and node[0] == PER_RANK:
        yield from walk(node[1], path)
        return
    for segment, child in children(node):
        yield from walk(child, (*path, segment))


def renumber(
    node: Node,
    number: Callable[[int], int],
    value: Callable[[int], int] = lambda number: number,
    metadata: Callable[[int], int] | None = None,
) -> Node:
    """Return the tree with other numbers.

    Args:
        node: Any.
        number: Gives the new number of a tensor entry.
        value: Gives that of a value.
        metadata: Gives that of the value that is a module's metadata; ``value`` does where it is None.
    """
    if isinstance(node, int):
        return number(node) if node >= 0 else value_node(value(value_number(node)))
    if isinstance(node, dict):
        return {key: renumber(child, number, value, metadata) for key, child in node.items()}
    tag = node[0]
    if tag in BLOBS:
        return [tag, number(node[1]), *node[2:]]
    if tag == PER_RANK:
        return [tag, renumber(node[1], number, value, metadata)]
    if tag == OWN:
        return node
    if tag in ("list", "tuple"):
        return [tag, [renumber(child, number, value, metadata) for child in node[1]]]
    if tag == "module":
        about = None if node[2] is None else renumber(node[2], number, metadata or value)
        return [tag, renumber(node[1], number, value, metadata), about]
    return [tag, [[key, renumber(child, number, value, metadata)] for key, child in node[1]]]


Place = Callable[[Segments, list[Any]], "Node | None"]
"""Gets the path and the node of a place that is each rank's own, and returns what stands there from now on."""


def fill_places(node: Node, place: Place, path: Segments = ()) -> Node | None:
    """Return the tree with something else in each place that is each rank's own.

    Where ``place`` returns None the place is dropped from its mapping; a list with such a place is dropped too.
    """
    if isinstance(node, int):
        return node
    if isinstance(node, dict):
        return _filled(node, place, path)
    tag = node[0]
    if tag in BLOBS:
        return node
    if tag in (OWN, PER_RANK):
        return place(path, node)
    if tag in ("list", "tuple"):
        parts = [fill_places(part, place, (*path, str(index))) for index, part in enumerate(node[1])]
        return None if None in parts else [tag, parts]
    if tag == "module":
        return [tag, _filled(node[1], place, path), node[2]]
    pairs = [[key, fill_places(part, place, (*path, key_text(key)))] for key, part in node[1]]
    return [tag, [pair for pair in pairs if pair[1] is not None]]


def _filled(items: dict[str, Node], place: Place, path: Segments) -> dict[str, Node]:
    filled = {key: fill_places(part, place, (*path, key)) for key, part in items.items()}
    return {key: part for key, part in filled.items() if part is not None}


def check_tree(node: Node, *, entries: int, values: int, is_own: bool = False) -> None:
    """Check that JSON from a file is a tree whose numbers are below ``entries`` and ``values``.

    Args:
        node: The JSON.
        entries: How many there are.
        values: How many there are.
        is_own: Whether it is of a rank's own plan, where nothing is again of each rank.

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
            case ["own", str()] if not is_own:
                return
            case ["per_rank", part] if not is_own:
                parts = [part]
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
