"""The local plan: where everything of one rank lies, and what has no place."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.dtypes import BITS, nbytes_of
from aiockpt.format.image import ALIGN, parse_header
from aiockpt.format.manifest import FileRecord, Head, Plan, decode_manifest, encode_manifest
from aiockpt.format.names import file_name, sort_key
from aiockpt.format.tree import Node, walk
from aiockpt.planning.local import MAX_NAME_LENGTH, Entry, LocalPlan, PlanCache, plan_local
from tests.planning.files import arena_of, files_of, tree_of

safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")


def plan_of(*paths: str, **options: Any) -> LocalPlan:
    """Return the plan of small tensors at slash-separated paths."""
    entries = [Entry(tuple(path.split("/")), "F32", (2,)) for path in paths]
    return plan_local(entries, tree_of(entries), **options)


def body_of(plan: LocalPlan) -> Plan:
    body = dict(plan.texts)[plan.body_offset]
    assert len(body) == plan.body_nbytes
    return msgspec.json.decode(body, type=Plan)


SEGMENTS = st.text(st.characters(codec="utf-8"), max_size=4) | st.sampled_from(["model", "state", "0", "a.b", "a", "b"])


@st.composite
def states(draw: Any) -> list[Entry]:
    paths = draw(st.lists(st.lists(SEGMENTS, min_size=1, max_size=4).map(tuple), max_size=10))
    entries: dict[str, Entry] = {}
    for path in paths:
        # No tensor below a tensor, and no two names that read the same.
        if all(
            entry.segments[: len(path)] != path and path[: len(entry.segments)] != entry.segments
            for entry in entries.values()
        ):
            dtype = draw(st.sampled_from(["F64", "F32", "BF16", "U8", "C64"]))
            shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
            entries.setdefault(".".join(path), Entry(path, dtype, shape, draw(st.sampled_from(["", "C128"]))))
    return list(entries.values())


@settings(max_examples=150, deadline=None)
@given(states(), st.integers(1, 4))
def test_places(entries: list[Entry], per_file: int) -> None:
    """Files begin at multiples of 4096, tensors are aligned, inside their file's data, and meet nobody else."""
    plan = plan_local(entries, tree_of(entries), {"x%/config.json": b"{}"}, max_file_entries=per_file)
    spans = [(image.offset, image.offset + image.nbytes) for image in plan.files]
    spans.append((plan.body_offset, plan.body_offset + plan.body_nbytes))
    for (_, stop), (start, _) in pairwise(sorted(spans)):
        assert stop <= start < stop + ALIGN
    assert all(start % ALIGN == 0 for start, _ in spans)
    assert plan.arena_nbytes % ALIGN == 0
    assert spans[-1][1] <= plan.arena_nbytes < spans[-1][1] + ALIGN
    filled = [0] * len(plan.files)
    for i, entry in enumerate(entries):
        image = plan.files[plan.entry_files[i]]
        assert plan.sizes[i] == nbytes_of(entry.dtype, entry.shape)
        assert image.offset + image.data_start <= plan.offsets[i]
        assert plan.offsets[i] + plan.sizes[i] <= image.offset + image.nbytes
        assert plan.offsets[i] % (BITS[entry.dtype] // 8) == 0
        filled[plan.entry_files[i]] += plan.sizes[i]
    for image, nbytes in zip(plan.files, filled, strict=True):
        if image.data_start:
            assert nbytes == image.nbytes - image.data_start
    assert sorted(plan.order) == list(range(len(entries)))
    ordered = [plan.offsets[i] for i in plan.order]
    assert ordered == sorted(ordered)
    assert plan.data_nbytes == sum(plan.sizes)


@settings(max_examples=60, deadline=None)
@given(states(), st.integers(1, 4))
def test_safetensors_and_manifest_find_everything(entries: list[Entry], per_file: int) -> None:
    """The library reads each file; the manifest leads from each place of the tree to the right bytes."""
    tree = tree_of(entries)
    plan = plan_local(entries, tree, max_file_entries=per_file)
    contents = [bytes((7 * i + k) % 256 for k in range(size)) for i, size in enumerate(plan.sizes)]
    arena = arena_of(plan, contents)
    files = files_of(plan, arena)
    records = [
        FileRecord(path=image.path, nbytes=image.nbytes, data_start=image.data_start, sum="0" * 32)
        for image in plan.files
    ]
    head = Head(step=0, term=0, ordinal=0, save_id="ab", world_size=1, nbytes=0, created="", package="")
    body = arena[plan.body_offset : plan.body_offset + plan.body_nbytes]
    manifest = decode_manifest(encode_manifest(head, records, values=b"[]", metadata=b"null", plan=body), file="m")
    leaves = dict(walk(manifest.plan.tree))
    assert leaves.keys() == {entry.segments for entry in entries}
    read = {path: dict(safetensors.deserialize(data)) for path, data in files.items() if path.endswith(".safetensors")}
    for entry, content in zip(entries, contents, strict=True):
        number = leaves[entry.segments]
        path = records[manifest.plan.entry_files[number]].path
        found = read[path][manifest.plan.names[number]]
        assert bytes(found["data"]) == content
        assert (found["dtype"], tuple(found["shape"])) == (entry.dtype, entry.shape)
        dtype, shape, mark = manifest.plan.classes[manifest.plan.entry_classes[number]]
        assert (dtype, tuple(shape), mark) == entry[1:4]
    for path, data in files.items():
        if path.endswith(".safetensors"):
            parse_header(data, file=path, file_nbytes=len(data))
        else:
            index = json.loads(data)
            folder = path.rpartition("/")[0]
            assert all(name in read[f"{folder}/{file}"] for name, file in index["weight_map"].items())
            total = sum(
                len(found["data"])
                for file in set(index["weight_map"].values())
                for found in read[f"{folder}/{file}"].values()
            )
            assert index["metadata"]["total_size"] == total


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


def test_many_entries_take_several_files() -> None:
    """A folder with more tensors than a file takes has several files, all named by their number."""
    plan = plan_of(*(f"m/{i}" for i in range(7)), max_file_entries=3)
    assert [image.path for image in plan.files] == [
        *(f"m/model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)),
        "m/model.safetensors.index.json",
    ]
    assert sorted(plan.entry_files) == [0, 0, 0, 1, 1, 1, 2]
    assert len(plan_of(*(f"m/{i}" for i in range(6)), max_file_entries=3).files) == 3


@pytest.mark.parametrize("limit", [1, 2000, 10_000])
def test_long_headers_take_several_files(limit: int) -> None:
    """A header stays below its limit wherever an entry alone does: names of any length, shapes of any depth."""
    entries = [Entry(("m", f"{i}" + '"ü' * i), "F8_E4M3FNUZ", (1,) * i) for i in range(50)]
    plan = plan_local(entries, tree_of(entries), max_header_nbytes=limit)
    texts = dict(plan.texts)
    headers = [texts[image.offset] for image in plan.files if image.data_start]
    assert all(len(header.rstrip()) <= limit + 200 for header in headers if limit > 2000)
    assert (len(headers) == 50) == (limit == 1)


def test_headers_of_large_files() -> None:
    """The checksums of large tensors count too."""
    entries = [Entry(("m", dtype), dtype, (1 << 18, 1 << 20)) for dtype in BITS]
    plan = plan_local(entries, tree_of(entries), max_header_nbytes=1_200_000)
    headers = [(text, offset) for offset, text in plan.texts if b"aiockpt.blocks" in text]
    assert 1 < len(headers) < len(entries)
    alone = 16 * ((1 << 38) * 8 >> 24) + 500  # F64 is over the limit by itself
    assert all(len(text.rstrip()) < max(1_200_200, alone) for text, _ in headers)


def test_tensors_that_no_memory_holds() -> None:
    """An expanded tensor claims what nobody has: refused with its name and the figures, before anything is made."""
    entries = [Entry(("m", "a"), "F32", (1 << 40,)), Entry(("m", "bias"), "F32", (1 << 50,))]
    with pytest.raises(UnsupportedValueError, match="expanded") as caught:
        plan_local(entries, tree_of(entries))
    assert caught.value.key == "m.bias"
    assert f"{4 << 50:,}" in caught.value.why
    assert caught.value.next


@settings(max_examples=60, deadline=None)
@given(states(), st.randoms(use_true_random=False))
def test_order_of_entries_does_not_matter(entries: list[Entry], random: Any) -> None:
    """Ranks that meet the same tensors in another order make the same plan."""
    shuffled = list(entries)
    random.shuffle(shuffled)
    numbers = {entry.segments: number for number, entry in enumerate(shuffled)}
    tree = tree_of(entries)
    plan = plan_local(entries, tree)
    again = plan_local(shuffled, _renumbered(tree, [numbers[entry.segments] for entry in entries]))
    assert again.digest == plan.digest
    assert again.texts == plan.texts
    assert again.files == plan.files
    for entry, offset in zip(entries, plan.offsets, strict=True):
        assert again.offsets[numbers[entry.segments]] == offset


def _renumbered(node: Node, numbers: list[int]) -> Node:
    return numbers[node] if isinstance(node, int) else {key: _renumbered(child, numbers) for key, child in node.items()}


CHANGES: dict[str, Any] = {
    "name": lambda entry: entry._replace(segments=("m", "c")),
    "folder": lambda entry: entry._replace(segments=("n", "a")),
    "dtype": lambda entry: entry._replace(dtype="I32"),
    "shape": lambda entry: entry._replace(shape=(1, 2)),
    "mark": lambda entry: entry._replace(mark="C128"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_digest_changes_with_everything(change: Any) -> None:
    """Equal digests are equal plans."""
    entries = [Entry(("m", "a"), "F32", (2,)), Entry(("m", "b"), "F32", (2,))]
    changed = [change(entries[0]), entries[1]]
    assert plan_local(entries, tree_of(entries)).digest != plan_local(changed, tree_of(changed)).digest


def test_digest_changes_with_the_tree() -> None:
    """The same tensors in another structure are another plan; where they lie in memory does not matter."""
    entries = [Entry(("m", "a"), "F32", (2,))]
    digests = {
        plan_local(entries, tree).digest
        for tree in (
            {"m": {"a": 0}},
            {"m": ["OrderedDict", [["a", 0]]]},
            {"m": {"a": 0, "lr": -1}},
            {"m": {"b": 0, "a": 0}},
        )
    }
    assert len(digests) == 4
    assert plan_local(entries, {"m": {"a": 0}}).digest == plan_local(list(entries), {"m": {"a": 0}}).digest


def test_tied_tensors_are_stored_once() -> None:
    """An entry may stand at several places of the tree."""
    plan = plan_local([Entry(("m", "a"), "F32", (2,))], {"m": {"a": 0, "b": 0}})
    assert plan.data_nbytes == 8
    assert dict(walk(body_of(plan).tree)) == {("m", "a"): 0, ("m", "b"): 0}


def test_plain_files() -> None:
    """They lie in the arena like others, without checksums of ours; an empty one too."""
    plan = plan_of("model/w", plain_files={"model/config.json": b'{"a":1}', "model/empty": b""})
    files = {image.path: image for image in plan.files}
    config = files["model/config.json"]
    assert (config.nbytes, config.data_start, config.sums_at) == (7, 0, 0)
    assert (config.offset, b'{"a":1}') in plan.texts
    assert files["model/empty"].nbytes == 0


def test_plain_file_with_the_path_of_another() -> None:
    """Two files of one path would be one."""
    with pytest.raises(ValueError, match="path of another file"):
        plan_of("model/w", plain_files={"model/model.safetensors.index.json": b"{}"})


def test_nothing_to_save() -> None:
    """A state of values alone has no files, and a plan."""
    plan = plan_local([], {"lr": -1})
    assert plan.files == ()
    assert body_of(plan).tree == {"lr": -1}
    assert plan.arena_nbytes == ALIGN


def test_empty_tensors() -> None:
    """Tensors without bytes have places and names."""
    entries = [Entry(("m", "a"), "F32", (0, 3)), Entry(("m", "b"), "U8", ())]
    plan = plan_local(entries, tree_of(entries))
    assert plan.sizes == (0, 1)
    assert len(safetensors.deserialize(files_of(plan, arena_of(plan, [b"", b"x"]))[plan.files[0].path])) == 2


@pytest.mark.parametrize("entry", [Entry(("a",), "C128", (1,)), Entry(("a",), "U8", (-1,)), Entry(("a",), "F4", (1,))])
def test_entries_that_are_none(entry: Entry) -> None:
    """A dtype or shape that no file has is a bug of the caller."""
    with pytest.raises(ValueError, match=r"."):
        plan_local([entry], {"a": 0})


def many(count: int) -> tuple[list[Entry], Node]:
    entries = [Entry(("optimizer", f"layers.{i}.weight", "exp_avg"), "F32", (32, 32)) for i in range(count)]
    return entries, tree_of(entries)


def test_ten_thousand_entries() -> None:
    """A plan of 10,000 tensors takes well under a second, the second time almost nothing."""
    entries, tree = many(10_000)
    cache = PlanCache()
    start = time.perf_counter()
    plan = cache.plan(entries, tree, {})
    first = time.perf_counter() - start
    again, tree_again = many(10_000)
    start = time.perf_counter()
    assert cache.plan(again, tree_again, {}) is plan
    second = time.perf_counter() - start
    assert first < 0.8  # 0.05 alone
    assert second < 0.08  # 0.001 alone
    assert cache.misses == 1


def test_cache_hits_and_misses() -> None:
    """The plan is made again when anything changes, and only then."""
    cache = PlanCache()
    entries, tree = many(3)
    plan = cache.plan(entries, tree, {})
    assert cache.plan(list(entries), json.loads(json.dumps(tree)), {}) is plan
    for misses, (changed, changed_tree, plain) in enumerate(
        [
            (*many(2), {}),
            ([*entries[:2], entries[2]._replace(shape=(1024,))], tree, {}),
            (entries, tree | {"lr": -1}, {}),
            (entries, tree, {"optimizer/config.json": b"{}"}),
            (entries, tree, {"optimizer/config.json": b"{ }"}),
            (entries, tree, {}),
        ],
        start=2,
    ):
        cache.plan(changed, changed_tree, plain)
        assert cache.misses == misses


def test_cache_tells_keys_of_different_types_apart() -> None:
    """1, 1.0 and True are equal for Python, and three keys for a checkpoint."""
    cache = PlanCache()
    entries = [Entry(("m", "1"), "F32", (2,))]
    plans = [cache.plan(entries, {"m": ["dict", [[key, 0]]]}, {}) for key in (1, True, 1.0, "1")]
    assert cache.misses == 4
    assert len({plan.digest for plan in plans}) == 4


def test_cache_sees_a_tree_that_was_changed_in_place() -> None:
    """A caller that reuses its lists is not given the old plan."""
    cache = PlanCache()
    entries, tree = many(2)
    old = cache.plan(entries, tree, {})
    tree["lr"] = -1
    entries[0] = entries[0]._replace(dtype="I32")
    assert cache.plan(entries, tree, {}).digest != old.digest


def test_cache_after_an_error() -> None:
    """A state that was refused leaves the last plan as it was."""
    cache = PlanCache()
    entries, tree = many(2)
    plan = cache.plan(entries, tree, {})
    with pytest.raises(UnsupportedValueError):
        cache.plan([*entries, entries[0]], tree, {})
    assert cache.plan(entries, tree, {}) is plan
    assert cache.misses == 1


@given(st.lists(st.lists(st.text(st.characters()), min_size=1, max_size=3).map(tuple), max_size=8))
def test_the_order_of_entries_is_that_of_their_bytes(paths: list[tuple[str, ...]]) -> None:
    """Text compares by code points, lone surrogates too, and these are in the order of their UTF-8."""
    assert sorted(paths) == sorted(paths, key=sort_key)


def test_files_on_disk_are_for_safetensors(tmp_path: Path) -> None:
    """``safe_open`` reads a file of the plan from disk, by name."""
    entries = [Entry(("model", "b"), "U8", (3,)), Entry(("model", "a"), "I64", (2,))]
    plan = plan_local(entries, tree_of(entries))
    files = files_of(plan, arena_of(plan, [b"\1\2\3", (5).to_bytes(8, "little") + (6).to_bytes(8, "little")]))
    path = tmp_path / "model.safetensors"
    path.write_bytes(files["model/model-00001-of-00001.safetensors"])
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.get_tensor("b").tolist() == [1, 2, 3]
        assert file.get_tensor("a").tolist() == [5, 6]
