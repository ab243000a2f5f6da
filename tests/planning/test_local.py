"""The local plan: where everything of one rank lies, and what has no place."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.dtypes import BITS, nbytes_of
from aiockpt.format.image import ALIGN, parse_header
from aiockpt.format.manifest import FileRecord, Head, decode_manifest, encode_manifest
from aiockpt.format.tree import Node, walk
from aiockpt.planning.local import Entry, plan_local
from tests.planning.files import arena_of, body_of, files_of, plan_of, tree_of

safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")


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
