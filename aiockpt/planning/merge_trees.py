"""The trees of several ranks → one: mappings and modules grow by their keys, everything else must be equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from aiockpt.format.names import Segments, dotted
from aiockpt.format.tree import (
    MAPPINGS,
    OWN,
    Node,
    is_blob,
    key_text,
    renumber,
    value_node,
    value_number,
)

__all__ = ["ContradictionError", "Source", "TreeMerger"]

Source = tuple[int, int]
"""(number of the body, number of the value in it)."""


class ContradictionError(Exception):
    """Two trees have something different at one place.

    Args:
        path: The place.
        first: What stands there in an earlier tree.
        second: What stands there in the tree that was added.
    """

    def __init__(self, path: Segments, first: str, second: str) -> None:
        super().__init__(dotted(path), first, second)
        self.path, self.first, self.second = path, first, second


class TreeMerger:
    """Takes one tree after the other; ``tree`` is what they are together, in numbers of its own, and grows in place.

    Args:
        name_of: Gives the name of a common entry, for messages.
    """

    def __init__(self, name_of: Callable[[int], str]) -> None:
        self.tree: Node = None
        self._name_of = name_of
        self.sources: list[list[Source]] = []
        """By value: which values of which bodies stand at its place; they should be equal."""
        self.metadata: set[int] = set()
        """The values that are a module's metadata: each rank has those of the parts it has."""
        self._body = 0
        self._entries: Sequence[int] = ()
        self._places: dict[int, dict[str, int]] = {}
        """By identity of a list of pairs: the index of each key."""
        self._kept: list[object] = []  # so that no other list gets the identity of one of these

    def add(self, body: int, tree: Node, entries: Sequence[int]) -> None:
        """Take in the tree of a body; ``entries`` are the common numbers of its entries.

        Raises:
            ContradictionError: It has something else at a place than those before it.
        """
        self._body, self._entries = body, entries
        self.tree = self._adopted(tree) if self.tree is None else self._merged(self.tree, tree, ())

    def _adopted(self, node: Node) -> Node:
        return renumber(node, self._entries.__getitem__, self._new_value, self._new_metadata)

    def _new_value(self, number: int) -> int:
        self.sources.append([(self._body, number)])
        return len(self.sources) - 1

    def _new_metadata(self, number: int) -> int:
        found = self._new_value(number)
        self.metadata.add(found)
        return found

    def _merged(self, known: Node, node: Node, path: Segments) -> Node:
        if isinstance(known, int) and isinstance(node, int) and known < 0 and node < 0:
            self._same_value(known, node)
            return known
        if isinstance(known, dict) and isinstance(node, dict):
            return self._items(known, node, path)
        if isinstance(known, int) or isinstance(node, int) or _kind(known) != _kind(node):
            return self._equal(known, node, path)
        kind = _kind(known)
        if kind == "module":
            return self._module(known, node, path)
        if kind in MAPPINGS:
            return [kind, self._pairs(_pairs_of(known), _pairs_of(node), path)]
        if kind in ("list", "tuple") and len(known[1]) == len(node[1]):
            for index, (part, other) in enumerate(zip(known[1], node[1], strict=True)):
                known[1][index] = self._merged(part, other, (*path, str(index)))
            return known
        return self._equal(known, node, path)

    def _same_value(self, known: Node, node: Node) -> None:
        self.sources[value_number(known)].append((self._body, value_number(node)))

    def _items(self, known: dict[str, Node], items: dict[str, Node], path: Segments) -> dict[str, Node]:
        for key, node in items.items():
            known[key] = self._merged(known[key], node, (*path, key)) if key in known else self._adopted(node)
        return known

    def _module(self, known: Node, node: Node, path: Segments) -> Node:
        metadata = known[2]
        if metadata is not None and node[2] is not None:
            self._same_value(metadata, node[2])
        elif node[2] is not None:
            metadata = value_node(self._new_metadata(value_number(node[2])))
        return ["module", self._items(known[1], node[1], path), metadata]

    def _pairs(self, known: list[list[Any]], pairs: list[list[Any]], path: Segments) -> list[list[Any]]:
        places = self._places.get(id(known))
        if places is None:
            places = self._places[id(known)] = {key_text(pair[0]): index for index, pair in enumerate(known)}
            self._kept.append(known)
        for key, node in pairs:
            index = places.setdefault(key_text(key), len(known))
            if index == len(known):
                known.append([key, self._adopted(node)])
            elif known[index][0] != key:
                raise ContradictionError((*path, key_text(key)), f"the key {known[index][0]!r}", f"the key {key!r}")
            else:
                known[index][1] = self._merged(known[index][1], node, (*path, key_text(key)))
        return known

    def _equal(self, known: Node, node: Node, path: Segments) -> Node:
        """Return a node that has no parts to merge, or whose parts do not match."""
        is_leaf = (isinstance(node, int) and node >= 0) or is_blob(node) or _kind(node) == OWN
        found = renumber(node, self._entries.__getitem__) if is_leaf else node
        if is_leaf and found == known:
            return known
        raise ContradictionError(path, self._what(known), self._what(found))

    def _what(self, node: Node) -> str:
        """Return what a node in common numbers is, for people."""
        kind = _kind(node)
        if kind == "tensor":
            return f"the tensor {self._name_of(node)!r}"
        if kind in ("list", "tuple"):
            return f"a {kind} of {len(node[1])}"
        names = {OWN: "a PerRank", "bytes": "bytes", "OrderedDict": "an OrderedDict", "ndarray": f"an array {node!r}"}
        return names.get(kind, f"a {kind.partition(':')[0]}")


def _kind(node: Node) -> str:
    if isinstance(node, int):
        return "tensor" if node >= 0 else "value"
    return "dict" if isinstance(node, dict) else str(node[0])


def _pairs_of(node: Node) -> list[list[Any]]:
    if isinstance(node, dict):
        return [[key, part] for key, part in node.items()]
    pairs: list[list[Any]] = node[1]
    return pairs
