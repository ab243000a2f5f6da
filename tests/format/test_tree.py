"""Trees: what walk, renumber, children and the check have in common."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiockpt.format.tree import (
    BLOBS,
    MAPPINGS,
    Node,
    check_tree,
    children,
    fill_places,
    is_blob,
    key_text,
    renumber,
    value_node,
    value_number,
    walk,
)
from aiockpt.format.values import encode_value

ENTRIES, VALUES = 7, 5

NUMBERS = st.integers(-VALUES, ENTRIES - 1)
ENTRY = st.integers(0, ENTRIES - 1)
BLOB = (
    st.tuples(st.just("bytes"), ENTRY)
    | st.tuples(st.just("BytesIO"), ENTRY, st.integers(0, 9))
    | st.tuples(st.just("ndarray"), ENTRY, st.sampled_from(["<f4", "|u1"]))
).map(list)
NAMES = st.text(max_size=3)
KEYS = (NAMES | st.integers() | st.booleans() | st.none() | st.tuples(st.integers())).map(
    lambda key: encode_value(key, key=())
)


def containers(inner: Any) -> Any:
    pairs = st.lists(st.tuples(KEYS, inner).map(list), max_size=3)
    return (
        st.dictionaries(NAMES, inner, max_size=3)
        | st.tuples(st.sampled_from(["list", "tuple"]), st.lists(inner, max_size=3)).map(list)
        | st.tuples(st.sampled_from(sorted(MAPPINGS)), pairs).map(list)
        | st.tuples(
            st.just("module"), st.dictionaries(NAMES, inner, max_size=3), st.none() | st.integers(-VALUES, -1)
        ).map(list)
    )


TREES = st.recursive(NUMBERS | BLOB, containers, max_leaves=12)


def leaves(node: Node) -> list[Node]:
    """Return the leaves by a way of its own: by the shape of the JSON."""
    if isinstance(node, int) or is_blob(node):
        return [node]
    if isinstance(node, dict):
        parts = list(node.values())
    elif node[0] == "module":
        parts = list(node[1].values())
    elif node[0] in MAPPINGS:
        parts = [part for _, part in node[1]]
    else:
        parts = node[1]
    return [leaf for part in parts for leaf in leaves(part)]


@settings(max_examples=200, deadline=None)
@given(TREES)
def test_walk_finds_every_leaf(tree: Node) -> None:
    """Each leaf once, in order, under the path that children gives."""
    found = list(walk(tree))
    assert [leaf for _, leaf in found] == leaves(tree)
    for path, leaf in found:
        candidates = [tree]
        for segment in path:
            inner = [node for node in candidates if not isinstance(node, int) and not is_blob(node)]
            candidates = [child for node in inner for name, child in children(node) if name == segment]
        assert leaf in candidates


@settings(max_examples=200, deadline=None)
@given(TREES, st.permutations(range(ENTRIES)))
def test_renumber_changes_entries_alone(tree: Node, order: list[int]) -> None:
    """Every entry's number is replaced, nothing else, and the given tree stays."""
    before = msgspec.json.encode(tree)
    renumbered = renumber(tree, order.__getitem__)
    assert msgspec.json.encode(tree) == before
    assert renumber(renumbered, order.index) == tree
    for (path, old), (new_path, new) in zip(walk(tree), walk(renumbered), strict=True):
        assert path == new_path
        if is_blob(old):
            assert new == [old[0], order[old[1]], *old[2:]]
        else:
            assert new == (order[old] if old >= 0 else old)


@settings(max_examples=200, deadline=None)
@given(TREES)
def test_check_takes_every_tree(tree: Node) -> None:
    """Whatever a writer makes passes, also by way of JSON; with fewer entries or values it does not."""
    again = msgspec.json.decode(msgspec.json.encode(tree))
    check_tree(again, entries=ENTRIES, values=VALUES)
    assert list(walk(again)) == list(walk(tree))
    numbers = [leaf[1] if is_blob(leaf) else leaf for leaf in leaves(tree)]
    if any(number >= 0 for number in numbers):
        with pytest.raises(ValueError, match="tree"):
            check_tree(again, entries=max(numbers), values=VALUES)
    if any(number < 0 for number in numbers):
        with pytest.raises(ValueError, match="tree"):
            check_tree(again, entries=ENTRIES, values=-min(numbers) - 1)


NO_TREES: list[Any] = [
    None,
    True,
    False,
    1.0,
    "a",
    "list",
    [],
    [0],
    [[]],
    ["list"],
    ["list", 0],
    ["list", {}],
    ["list", [0], 0],
    ["list", ["a"]],
    ["list", [None]],
    ["tuple", "ab"],
    ["set", [0]],
    ["dict"],
    ["dict", {}],
    ["dict", [0]],
    ["dict", [["a"]]],
    ["dict", [["a", 0, 0]]],
    ["dict", ["ab"]],
    ["dict", [["a", None]]],
    ["defaultdict:set", []],
    ["defaultdict:", []],
    ["Counter", []],
    ["module"],
    ["module", {}],
    ["module", [], None],
    ["module", 5, None],
    ["module", {}, 0],
    ["module", {}, True],
    ["module", {}, -6],
    ["module", {}, {}],
    ["module", {"a": "b"}, None],
    ["module", {}, None, None],
    ["bytes"],
    ["bytes", -1],
    ["bytes", 7],
    ["bytes", True],
    ["bytes", "0"],
    ["bytes", 0, 0],
    ["BytesIO", 0],
    ["BytesIO", 0, -1],
    ["BytesIO", 0, 1.5],
    ["BytesIO", 0, 1 << 63],
    ["ndarray", 0],
    ["ndarray", 0, 1],
    ["ndarray", -1, "<f4"],
    ["own"],
    ["own", 0],
    ["own", "a", "b"],
    ["per_rank"],
    ["per_rank", 7],
    ["per_rank", 0, 0],
    {"a": None},
    {"a": {"b": [7]}},
    7,
    -6,
    1 << 70,
]


@pytest.mark.parametrize("node", NO_TREES, ids=str)
@pytest.mark.parametrize("inside", [False, True])
def test_check_refuses_all_else(node: Any, inside: bool) -> None:
    """JSON that is no tree is refused, at the top and inside."""
    with pytest.raises(ValueError, match="tree"):
        check_tree({"a": ["list", [0, node]]} if inside else node, entries=ENTRIES, values=VALUES)


def test_deep_trees() -> None:
    """A state that is nested deeper than Python's stack ends in a RecursionError, which readers expect."""
    tree: Node = 0
    for _ in range(3000):
        tree = {"k": tree}
    with pytest.raises(RecursionError):
        check_tree(tree, entries=1, values=0)


PLACES: Node = {"a": ["per_rank", {"x": 0, "y": -1}], "b": ["list", [1, ["own", "k"]]], "c": ["per_rank", -2], "d": 2}


def test_places_of_each_rank() -> None:
    """What is each rank's own is walked as if it stood there by itself; what stands elsewhere is not."""
    check_tree(PLACES, entries=3, values=2)
    assert list(walk(PLACES)) == [(("a", "x"), 0), (("a", "y"), -1), (("b", "0"), 1), (("c",), -2), (("d",), 2)]
    assert [segment for segment, _ in children(PLACES["a"])] == ["x", "y"]
    assert list(children(PLACES["c"])) == list(children(["own", "k"])) == []
    assert renumber(PLACES, lambda n: n + 5, lambda n: n + 7)["a"] == ["per_rank", {"x": 5, "y": -8}]
    assert renumber(PLACES, lambda n: n + 5)["b"] == ["list", [6, ["own", "k"]]]
    for node in PLACES.values():
        if isinstance(node, list):
            with pytest.raises(ValueError, match="tree"):
                check_tree(node, entries=3, values=2, is_own=True)


def test_metadata_of_modules_has_numbers_of_its_own() -> None:
    """It is a value that a walk does not meet."""
    tree = ["module", {"m": ["module", {"v": -1}, -2]}, None]
    assert renumber(tree, int, lambda n: n + 10) == ["module", {"m": ["module", {"v": -11}, -12]}, None]
    renamed = renumber(tree, int, lambda n: n, lambda n: n + 20)
    assert renamed == ["module", {"m": ["module", {"v": -1}, -22]}, None]


@settings(max_examples=100, deadline=None)
@given(TREES)
def test_places_are_filled_where_there_are_any(tree: Node) -> None:
    """A tree without places stays as it is."""
    assert fill_places(tree, lambda path, node: pytest.fail("there is none")) == tree


def test_filling_places() -> None:
    """A place that has nothing goes from its mapping, with the list that it stands in; paths are those of the walk."""
    tree = {**PLACES, "m": ["module", {"w": ["own", "w"]}, -1], "p": ["OrderedDict", [[1, ["own", "p"]], [2, 0]]]}
    paths = []

    def place(path: Any, node: Any) -> Any:
        paths.append(path)
        return None if node[0] == "own" else node[1]

    filled = fill_places(tree, place)
    assert filled == {
        "a": {"x": 0, "y": -1},
        "c": -2,
        "d": 2,
        "m": ["module", {}, -1],
        "p": ["OrderedDict", [[2, 0]]],
    }
    assert paths == [("a",), ("b", "1"), ("c",), ("m", "w"), ("p", "1")]


@pytest.mark.parametrize("number", [0, 1, 1 << 40])
def test_value_numbers(number: int) -> None:
    """Values have the numbers below zero."""
    assert value_node(number) == -1 - number
    assert value_number(value_node(number)) == number


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("a.b", "a.b"),
        (7, "7"),
        (-1, "-1"),
        (True, "true"),
        (None, "null"),
        (1.5, "1.5"),
        ((1, "x"), '{"~tuple":[1,"x"]}'),
        (b"\0", '{"~bytes":"AA=="}'),
        ("\udc80", '{"~str":"7bKA"}'),
    ],
)
def test_key_text(key: Any, text: str) -> None:
    """Keys that are no text have their JSON as segment, on every Python alike."""
    assert key_text(encode_value(key, key=())) == text
    assert [segment for segment, _ in children(["dict", [[encode_value(key, key=()), 0]]])] == [text]


def test_tags_do_not_meet() -> None:
    """A tag says which kind of node it is."""
    assert not MAPPINGS & BLOBS
    assert not (MAPPINGS | BLOBS) & {"list", "tuple", "module", "own", "per_rank"}
