"""Plans of several ranks: every byte is written once, and every reader finds it."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.dtypes import nbytes_of
from aiockpt.format.image import parse_header
from aiockpt.format.manifest import Manifest, Plan
from aiockpt.format.names import EXTRA
from aiockpt.format.offsets import saved_offsets
from aiockpt.format.placings import ShardingRecord
from aiockpt.format.ranks import RankView, plan_for
from aiockpt.format.tree import walk
from aiockpt.planning.local import Entry, PlanCache, plan_local
from aiockpt.planning.placings import PER_RANK, UNDECLARED, Placing, replicated, sharding_of
from aiockpt.planning.sharding import Cut, Sharding, shard_order
from tests.planning.files import tree_of
from tests.planning.job import Job, State, whole_array

safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")

FSDP = Sharding((4,), (0, 1, 2, 3), (Cut(0, 0),))
HSDP = Sharding((2, 2), (0, 1, 2, 3), (Cut(1, 0),))
STRIDED = Sharding((2, 2), (0, 1, 2, 3), (Cut(0, 0, 2), Cut(1, 1)))


@st.composite
def placings(draw: st.DrawFn, world: int, dims: int) -> Placing:
    kind = draw(st.sampled_from(["sharded", "sharded", "sharded", "undeclared", "per_rank", "replicated"]))
    if kind != "sharded":
        return {"undeclared": UNDECLARED, "per_rank": PER_RANK, "replicated": replicated(world)}[kind]
    mesh = draw(st.sampled_from([mesh for mesh in MESHES if math.prod(mesh) == world]))
    ranks = draw(st.just(tuple(range(world))) | st.permutations(range(world)).map(tuple))
    mesh_dims = draw(st.permutations(range(len(mesh))))[: draw(st.integers(0, len(mesh)))] if dims else []
    strides = st.sampled_from([1, 1, 2, 3])
    return Sharding(mesh, ranks, tuple(Cut(at, draw(st.integers(0, dims - 1)), draw(strides)) for at in mesh_dims))


MESHES = [(1,), (2,), (3,), (4,), (6,), (2, 2), (2, 3), (3, 2), (1, 4), (2, 1, 2)]


@st.composite
def jobs(draw: st.DrawFn) -> tuple[int, list[Entry]]:
    world = draw(st.sampled_from([2, 3, 4, 6]))
    entries = []
    for number in range(draw(st.integers(0, 8))):
        shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 8]), max_size=3)))
        folder = draw(st.sampled_from(["model", "optimizer", "a/b"]))
        path = (folder, f"t{number}") if draw(st.integers(0, 5)) else (f"top{number}",)
        dtype = draw(st.sampled_from(["F32", "U8", "BF16"]))
        entries.append(Entry(path, dtype, shape, "", draw(placings(world, len(shape)))))
    return world, entries


def state(entries: list[Entry]) -> State:
    """A state whose per-rank tensors stand where ``PerRank`` stood."""
    tree = tree_of(entries)
    for number, entry in enumerate(entries):
        node = tree
        for segment in entry.segments[:-1]:
            node = node[segment]
        if entry.placing == PER_RANK:
            node[entry.segments[-1]] = ["per_rank", number]
    return State(entries, tree)


def read_back(job: Job, view: RankView, entry: int, reader: int) -> np.ndarray:
    """Return the tensor put together from the files as a reader finds them, each byte seen once."""
    plan, files = view.plan, job.records
    dtype, shape, _ = plan.classes[plan.entry_classes[entry]]
    placing = plan.placings[plan.entry_placings[entry]]
    name, first = plan.names[entry], files[plan.entry_files[entry]]
    itemsize = nbytes_of(dtype, [1])
    if not isinstance(placing, ShardingRecord):
        assert first.rank == reader or placing == "undeclared"
        return np.frombuffer(tensors_of(job, first.path)[name]["data"], np.uint8).reshape((*shape, itemsize))
    sharding = sharding_of(placing)
    found, seen = np.zeros((*shape, itemsize), np.uint8), np.zeros(shape, int)
    owners = dict(sharding.owners(plan.entry_replicas[entry]))
    folder = first.path.rpartition("/")[0]
    assert first.rank in owners.values()
    for rank in owners.values():
        for record in files:
            if record.rank != rank or record.path.rpartition("/")[0] != folder or EXTRA in record.path:
                continue
            content = job.files[record.path]
            header = parse_header(content, file=record.path, file_nbytes=len(content))
            stored = header.tensors.get(name)
            if stored is None:
                continue
            starts = saved_offsets(header, file=record.path).get(name, (0,) * len(shape))
            box = tuple(slice(at, at + n) for at, n in zip(starts, stored.shape, strict=True))
            found[box] = np.frombuffer(content[stored.start : stored.stop], np.uint8).reshape((*stored.shape, itemsize))
            seen[box] += 1
    assert (seen == 1).all()
    return found


def tensors_of(job: Job, path: str) -> dict[str, Any]:
    return dict(safetensors.deserialize(job.files[path]))


@settings(max_examples=120, deadline=None)
@given(jobs(), st.sampled_from([1, 2, 100]))
def test_every_byte_is_written_once_and_found(case: tuple[int, list[Entry]], per_file: int) -> None:
    """Any mix of placings: the files hold each tensor once, and the manifest leads each rank to all and to its own."""
    world, entries = case
    job = Job(world, lambda rank: state(entries), max_file_entries=per_file)
    assert len({plan.digest for plan in job.plans}) == 1
    manifest = job.manifest()
    for rank in (0, world - 1):
        view = plan_for(manifest, rank)
        assert view.missing == []
        leaves = dict(walk(view.plan.tree))
        assert leaves.keys() == {entry.segments for entry in entries}
        for entry in entries:
            number = leaves[entry.segments]
            dtype, shape, _ = view.plan.classes[view.plan.entry_classes[number]]
            assert (dtype, tuple(shape)) == entry[1:3]
            assert (read_back(job, view, number, rank) == whole_array(entry, rank)).all()
    check_no_byte_twice(job, entries)


def check_no_byte_twice(job: Job, entries: list[Entry]) -> None:
    written: Counter[tuple[str, str]] = Counter()
    for record in job.records:
        if record.data_start:
            folder = record.path.rpartition("/")[0]
            for name, tensor in tensors_of(job, record.path).items():
                written[folder, name] += len(tensor["data"])
    for number, entry in enumerate(entries):
        times = job.world if entry.placing == PER_RANK else 1
        folder = "state" if len(entry.segments) == 1 else entry.segments[0].replace("/", "%2F")
        name = entry.segments[-1]
        assert written[folder, name] == times * nbytes_of(entry.dtype, entry.shape), number


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_places_of_parts(case: tuple[int, list[Entry]]) -> None:
    """In the arena of each rank: aligned, in their file, and as many bytes as the plan says."""
    world, entries = case
    for rank, plan in enumerate(Job(world, lambda rank: state(entries)).plans):
        assert len(plan.parts) == len(plan.offsets) == len(plan.sizes) == len(plan.entry_files)
        for part, offset, nbytes, file in zip(plan.parts, plan.offsets, plan.sizes, plan.entry_files, strict=True):
            image = plan.files[file]
            assert nbytes == nbytes_of(entries[part.entry].dtype, part.shape)
            assert image.offset + image.data_start <= offset <= offset + nbytes <= image.offset + image.nbytes
            assert (file in plan.extra_files) == (entries[part.entry].placing is UNDECLARED)
        assert [plan.offsets[number] for number in plan.order] == sorted(plan.offsets)
        assert f"model-{rank + 1:05d}-of-{world:05d}" in "".join(image.path for image in plan.files) or not plan.files


def test_names_of_the_files_of_a_rank() -> None:
    """By rank and world; a second box of a tensor, and what nobody declared, stand in files of their own."""
    entries = [
        Entry(("m", "cut"), "F32", (8, 2), "", STRIDED),
        Entry(("m", "plain"), "F32", (2,)),
        Entry(("rng", "cpu"), "U8", (16,), "", PER_RANK),
    ]
    job = Job(4, lambda rank: state(entries))
    paths = [image.path for image in job.plans[2].files]
    assert paths == [
        "m/model-00003-of-00004.safetensors",
        "m/model-00003-of-00004.2.safetensors",
        "rng/model-00003-of-00004.safetensors",
        "m/model-00003-of-00004.extra.safetensors",
    ]
    assert job.plans[2].extra_files == (3,)
    assert "m/model-00001-of-00004.extra.safetensors" in job.files
    assert "m/model-00002-of-00004.extra.safetensors" not in job.files
    assert job.plan.folders == ("m",)


def test_headers_say_where_chunks_begin() -> None:
    """A file with a chunk lists all of its tensors, the whole ones with zeros; a file without lists none."""
    entries = [
        Entry(("m", "cut"), "F32", (8, 2), "", FSDP),
        Entry(("m", "rule"), "F32", (2, 3), "", replicated(4)),
        Entry(("n", "whole"), "F32", (2,), "", replicated(4)),
    ]
    job = Job(4, lambda rank: state(entries))
    listed = {}
    for record in job.records:
        header = parse_header(job.files[record.path], file="f", file_nbytes=record.nbytes)
        listed[record.path.partition("/")[0], record.rank] = saved_offsets(header, file="f")
    assert [listed["m", rank]["cut"] for rank in range(4)] == [(0, 0), (2, 0), (4, 0), (6, 0)]
    assert listed["m", 0]["rule"] == (0, 0)
    assert listed["n", 1] == {}


def test_the_index_of_a_folder() -> None:
    """Each name with the file where it begins, and the bytes of all, as other libraries look for them."""
    entries = [Entry(("m", f"t{n}"), "F32", (4, n + 1), "", replicated(2)) for n in range(4)]
    entries.append(Entry(("m", "undeclared"), "U8", (3,)))
    job = Job(2, lambda rank: state(entries))
    index = json.loads(job.files["m/model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == sum(nbytes_of(entry.dtype, entry.shape) for entry in entries)
    assert index["weight_map"].keys() == {entry.segments[1] for entry in entries}
    for name, file in index["weight_map"].items():
        assert name in tensors_of(job, f"m/{file}")


def test_plain_files_come_from_rank_0() -> None:
    """A model's ``config.json`` is written once."""
    job = Job(
        3, lambda rank: State([Entry(("m", "w"), "U8", (3,), "", replicated(3))], None, (), {"m/config.json": b"{}"})
    )
    assert [image.path for image in job.plans[0].files].count("m/config.json") == 1
    assert all(image.data_start for plan in job.plans[1:] for image in plan.files)


def test_ddp_stages_its_share_alone() -> None:
    """Replicas of 4 ranks: each stages and writes a quarter, at most the mean and the largest tensor."""
    sizes = [7, 1, 900, 30, 30, 30, 500, 2, 2, 64, 128, 5]
    entries = [Entry(("m", f"t{n}"), "F32", (size,), "", replicated(4)) for n, size in enumerate(sizes)]
    plans = Job(4, lambda rank: state(entries)).plans
    assert sum(plan.data_nbytes for plan in plans) == 4 * sum(sizes)
    assert max(plan.data_nbytes for plan in plans) <= sum(sizes) + 4 * max(sizes)
    assert max(plan.data_nbytes for plan in plans) == 4 * max(sizes)


def test_ranks_of_a_hybrid_mesh_share_what_they_hold_twice() -> None:
    """HSDP: the two ranks that hold the same shard write a half of its tensors each."""
    entries = [Entry(("m", f"t{n}"), "F32", (8, 4), "", HSDP) for n in range(6)]
    plans = Job(4, lambda rank: state(entries)).plans
    assert [plan.data_nbytes for plan in plans] == [6 * 8 * 4 * 4 // 4] * 4


@pytest.mark.parametrize("length", [0, 1, 3, 5])
def test_uneven_and_empty_shards(length: int) -> None:
    """A rank with nothing of a tensor writes nothing of it; of an empty tensor the first rank says that it is there."""
    entries = [Entry(("m", "t"), "F32", (length, 2), "", FSDP)]
    job = Job(4, lambda rank: state(entries))
    paths = [record.path for record in job.records]
    assert len(paths) == max(1, -(-length // max(1, -(-length // 4))))
    view = plan_for(job.manifest(), 0)
    assert read_back(job, view, 0, 0).tobytes() == whole_array(entries[0]).tobytes()


def test_per_rank_places_may_differ_in_all() -> None:
    """A data loader's state with another structure on each rank leaves one body for all, and comes back by rank."""

    def state_of(rank: int) -> State:
        entries = [
            Entry(("model", "w"), "F32", (4,), "", replicated(3)),
            *(Entry(("loader", f"part{n}"), "U8", (rank + n + 1,), "", PER_RANK) for n in range(rank)),
        ]
        own = {f"part{n}": n + 1 for n in range(rank)}
        tree = {"lr": -1, "loader": ["per_rank", {"own": own, "epoch": -3}], "model": {"w": 0}, "step": -2}
        return State(entries, tree, [0.1, 7, f"epoch of {rank}"])

    job = Job(3, state_of)
    assert len({plan.digest for plan in job.plans}) == 1
    assert job.plans[0].common_values == (0, 1)
    assert job.plans[0].own_values == (2,)
    manifest = job.manifest()
    for rank in range(3):
        view = plan_for(manifest, rank)
        assert list(view.plan.tree) == ["lr", "loader", "model", "step"]
        leaves = dict(walk(view.plan.tree))
        assert view.values[-1 - leaves["loader", "epoch"]] == f"epoch of {rank}"
        assert view.values[-1 - leaves["lr",]] == 0.1
        for n in range(rank):
            number = leaves["loader", "own", f"part{n}"]
            assert view.plan.placings[view.plan.entry_placings[number]] == "per_rank"
            expected = whole_array(job.states[rank].entries[n + 1], rank)
            assert (read_back(job, view, number, rank) == expected).all()
    beyond = plan_for(manifest, 3)
    assert beyond.missing == [("loader",)]
    assert list(beyond.plan.tree) == ["lr", "model", "step"]


def test_an_entry_that_is_per_rank_and_common() -> None:
    """One tensor at two places of which one is each rank's own is refused by name."""
    entries = [Entry(("a", "t"), "F32", (2,), "", PER_RANK)]
    with pytest.raises(UnsupportedValueError, match="each rank's own") as caught:
        plan_local(entries, {"a": {"t": ["per_rank", 0]}, "b": 0}, rank=0, world=2)
    assert caught.value.key == "a.t"


def test_trees_that_cannot_be_said() -> None:
    """As with one rank: nested too deep, or with a key that is no UTF-8, inside of what is each rank's own too."""
    deep: Any = -1
    for _ in range(5000):
        deep = {"k": deep}
    for tree in (deep, {"rng": ["per_rank", deep]}):
        with pytest.raises(UnsupportedValueError, match="nested"):
            plan_local([], tree, rank=0, world=2)
        with pytest.raises(UnsupportedValueError, match="nested"):
            PlanCache(rank=0, world=2).plan([], tree, {})
    for tree in ({"\udc80": -1}, {"rng": ["per_rank", {"\udc80": -1}]}):
        with pytest.raises(UnsupportedValueError, match="surrogates"):
            plan_local([], tree, rank=0, world=2)


def test_expanded_tensors_are_refused_by_what_a_rank_holds() -> None:
    """A model that no host could hold is fine where each rank has a part of it."""
    entry = Entry(("m", "w"), "F32", (1 << 44,), "", Sharding((64,), tuple(range(64)), (Cut(0, 0),)))
    assert plan_local([entry], {"m": {"w": 0}}, rank=5, world=64).data_nbytes == 1 << 40
    with pytest.raises(UnsupportedValueError, match="expanded"):
        plan_local([entry._replace(placing=UNDECLARED)], {"m": {"w": 0}}, rank=5, world=64)


def test_float4_that_is_cut_within_bytes() -> None:
    """Torch counts its last dimension in bytes, the file in elements: the cuts would differ."""
    cut = Entry(("m", "t"), "F4", (4, 6), "", Sharding((2,), (0, 1), (Cut(0, 1),)))
    with pytest.raises(UnsupportedValueError, match="float4"):
        plan_local([cut], {"m": {"t": 0}}, rank=0, world=2)
    plan_local([cut._replace(placing=Sharding((2,), (0, 1), (Cut(0, 0),)))], {"m": {"t": 0}}, rank=0, world=2)


def test_bodies_have_no_rank() -> None:
    """SPMD ranks say the same bytes, whatever they hold."""
    entries = [
        Entry(("m", "a"), "F32", (7,), "", FSDP),
        Entry(("m", "b"), "F32", (7,), "", HSDP),
        Entry(("m", "c"), "F32", (7,)),
        Entry(("m", "d"), "F32", (7,), "", PER_RANK),
    ]
    digests = {plan.digest for plan in Job(4, lambda rank: state(entries)).plans}
    assert len(digests) == 1
    changed = [entries[0]._replace(placing=Sharding((4,), (0, 1, 2, 3), (Cut(0, 0, 2),))), *entries[1:]]
    assert plan_local(changed, state(changed).tree, rank=0, world=4).digest not in digests


def test_a_world_of_one_takes_no_notice_of_placings() -> None:
    """Its files, its manifest and its arena are those of a job that has never heard of ranks."""
    bare = [Entry(("m", "a"), "F32", (7,)), Entry(("m", "b"), "F32", (3, 2))]
    placed = [bare[0]._replace(placing=Sharding((1,), (0,), (Cut(0, 0),))), bare[1]._replace(placing=replicated(1))]
    assert plan_local(placed, tree_of(placed)) == plan_local(bare, tree_of(bare))
    assert b"placings" not in plan_local(placed, tree_of(placed)).texts[-1][1]


def test_cache_with_several_ranks() -> None:
    """Placings are looked at by value, one by one, and fast where they are shared objects."""
    many = Sharding((4096,), tuple(range(4096)), (Cut(0, 0),))
    entries = [Entry(("m", f"t{n}"), "F32", (8,), "", many) for n in range(100)]
    tree = tree_of(entries)
    cache = PlanCache(rank=3, world=4096)
    plan = cache.plan(entries, tree, {})
    copies = [entry._replace(placing=Sharding((4096,), tuple(range(4096)), (Cut(0, 0),))) for entry in entries]
    assert cache.plan(copies, tree, {}) is plan
    copies[7] = copies[7]._replace(placing=replicated(4096))
    assert cache.plan(copies, tree, {}) is not plan
    assert cache.misses == 2


def view_of_rules(manifest: Manifest) -> Plan:
    return plan_for(manifest, 0).plan


def test_shards_of_two_dimensions_in_their_order() -> None:
    """FSDP over tensor parallelism cuts one dimension twice, the right mesh dimension first."""
    rule = Sharding((2, 2), (0, 1, 2, 3), tuple(shard_order((2, 2), [(0, 2), (0, 1)])))
    entries = [Entry(("m", "t"), "F32", (7, 2), "", rule)]
    job = Job(4, lambda rank: state(entries))
    plan = view_of_rules(job.manifest())
    assert sharding_of(plan.placings[0]) == rule  # type: ignore[arg-type]  # it is no text
    assert read_back(job, plan_for(job.manifest(), 0), 0, 0).tobytes() == whole_array(entries[0]).tobytes()


def test_folders_have_the_ranks_that_write_there() -> None:
    """No rank makes a file for nothing."""
    entries = [Entry(("m", "t"), "F32", (4,), "", replicated(4)), Entry(("n", "t"), "F32", (4,), "", replicated(4))]
    by_folder = defaultdict(list)
    for record in Job(4, lambda rank: state(entries)).records:
        by_folder[record.path.partition("/")[0]].append(record.rank)
    assert sorted(len(ranks) for ranks in by_folder.values()) == [1, 1]
