"""Names in a plan: folders, keys that are no file names, names that meet or that no file can have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.names import file_name, sort_key
from aiockpt.format.tree import Node
from aiockpt.planning.local import MAX_NAME_LENGTH, Entry, PlanCache, plan_local
from tests.planning.files import body_of, plan_of, tree_of


def test_a_folder_for_each_top_level_key() -> None:
    """Each mapping at the top has its folder, with an index that others need even for one file."""
    plan = plan_of("model/layers.0/weight", "model/bias", "optimizer/state/bias/exp_avg")
    assert [image.path for image in plan.files] == [
        "model/model-00001-of-00001.safetensors",
        "model/model.safetensors.index.json",
        "optimizer/model-00001-of-00001.safetensors",
        "optimizer/model.safetensors.index.json",
    ]
    assert body_of(plan).names == ["bias", "layers.0.weight", "state.bias.exp_avg"]


def test_tensors_at_the_very_top() -> None:
    """They have no key for a folder, and stand under ``state`` by their own names."""
    plan = plan_of("ema", "model/weight", "running.mean")
    assert {image.path.partition("/")[0] for image in plan.files} == {"model", "state"}
    assert sorted(body_of(plan).names) == ["ema", "running.mean", "weight"]


@pytest.mark.parametrize("clash", ["state/weight", "state/state"])
def test_folder_of_the_top_where_state_is_a_key(clash: str) -> None:
    """Then it has a name that is the name of no key."""
    plan = plan_of("ema", clash)
    assert {image.path.partition("/")[0] for image in plan.files} == {"state", "%state"}
    assert plan.files[plan.entry_files[0]].path.startswith("%state/")
    assert file_name("%state") == "%25state"


def test_a_tensor_with_the_name_of_the_folder_of_the_top() -> None:
    """A tensor named ``state`` at the top is no folder."""
    plan = plan_of("state")
    assert {image.path.partition("/")[0] for image in plan.files} == {"state"}
    assert body_of(plan).names == ["state"]


def test_keys_that_are_no_file_names() -> None:
    """Folders are safe, distinct and below the checkpoint; the tree has the real keys."""
    keys = ["..", ".", "a/b", "a%2Fb", "", "manifest.json", "x" * 300, "ü"]
    entries = [Entry((key, "w"), "U8", (1,)) for key in keys]
    plan = plan_local(entries, tree_of(entries))
    folders = [plan.files[i].path.partition("/")[0] for i in plan.entry_files]
    assert len(set(folders)) == len(keys)
    assert all(image.path.count("/") == 1 and not image.path.startswith(".") for image in plan.files)
    assert list(body_of(plan).tree) == keys


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("m", "a.b"), ("m", "a", "b")),
        (("m.a", "b"), ("m", "a.b")),
        (("m", "", "b"), ("m", ".b")),
        (("a", "b"), ("a.b",)),
    ],
)
def test_names_that_read_the_same(first: tuple[str, ...], second: tuple[str, ...]) -> None:
    """Two tensors with one dotted name are refused, and the error names both paths."""
    with pytest.raises(UnsupportedValueError) as caught:
        plan_local([Entry(first, "U8", (1,)), Entry(("z",), "U8", (1,)), Entry(second, "U8", (1,))], {})
    error = caught.value
    assert {error.key, error.other_key} == {repr(list(first)), repr(list(second))}
    for path in (first, second):
        assert repr(list(path)) in error.why
    assert ".".join(first) in error.what
    assert error.next


@pytest.mark.parametrize(
    ("segments", "why"),
    [
        (("model", "__metadata__"), "__metadata__"),
        (("__metadata__",), "__metadata__"),
        (("model", "a\udc80"), "surrogates"),
        (("model\udc80", "a"), "surrogates"),
        (("model", "x" * MAX_NAME_LENGTH), "characters"),
    ],
    ids=["metadata", "metadata at the top", "no UTF-8", "no UTF-8 in the folder", "long"],
)
def test_names_that_no_file_can_have(segments: tuple[str, ...], why: str) -> None:
    """Refused by key before a byte is copied, with what, why and next; the message stays short."""
    with pytest.raises(UnsupportedValueError) as caught:
        plan_local([Entry(segments, "U8", (1,))], {})
    error = caught.value
    assert error.key is not None
    assert error.key.startswith(".".join(segments)[:80])
    assert why in error.why
    assert error.next
    assert len(str(error)) < 500


def test_names_that_only_look_reserved() -> None:
    """``__metadata__`` is reserved as a whole name alone."""
    plan = plan_of("model/a/__metadata__", "__metadata__/a", "model/__metadata__x")
    assert sorted(body_of(plan).names) == ["__metadata__x", "a", "a.__metadata__"]


def test_tree_with_keys_that_are_no_utf8() -> None:
    """A key without a tensor may not break the manifest either."""
    with pytest.raises(UnsupportedValueError, match="surrogates") as caught:
        plan_local([], {"progress": {"\udc80": -1}})
    assert caught.value.key == "\udc80"
    with pytest.raises(UnsupportedValueError, match="surrogates"):
        PlanCache().plan([], {"progress": {"\udc80": -1}}, {})


def test_tree_that_is_nested_too_deep() -> None:
    """The end of Python's stack is an error of ours."""
    tree: Node = -1
    for _ in range(5000):
        tree = {"k": tree}
    with pytest.raises(UnsupportedValueError, match="nested"):
        plan_local([], tree)
    with pytest.raises(UnsupportedValueError, match="nested"):
        PlanCache().plan([], tree, {})


@given(st.lists(st.lists(st.text(st.characters()), min_size=1, max_size=3).map(tuple), max_size=8))
def test_the_order_of_entries_is_that_of_their_bytes(paths: list[tuple[str, ...]]) -> None:
    """Text compares by code points, lone surrogates too, and these are in the order of their UTF-8."""
    assert sorted(paths) == sorted(paths, key=sort_key)
