"""Bytes of released versions that several ranks wrote: made once, never again by a test."""

from __future__ import annotations

from pathlib import Path

import msgspec

from aiockpt.format.image import TensorSpec, fill_sums, lay_out, parse_header
from aiockpt.format.manifest import FileRecord, Head, Plan, decode_manifest, encode_manifest, encode_own
from aiockpt.format.offsets import offsets_metadata, saved_offsets
from aiockpt.format.placings import ShardingRecord
from aiockpt.format.ranks import plan_for
from aiockpt.planning.placings import sharding_of
from aiockpt.planning.sharding import Cut, Sharding

HERE = Path(__file__).parent
IMAGE = (HERE / "format-1-ranks.safetensors").read_bytes()
MANIFEST = (HERE / "format-1-ranks.manifest.json").read_bytes()

SPECS = [TensorSpec("cut", "F32", (1, 2)), TensorSpec("whole", "U8", (3,)), TensorSpec('quo"te', "BF16", (2,))]
OFFSETS = {"cut": (2, 0), "whole": (0,), 'quo"te': (4,)}


def test_image_of_a_rank() -> None:
    """A file with parts is these bytes, and says of each tensor where it begins."""
    layout = lay_out(SPECS, offsets_metadata(OFFSETS))
    header = bytearray(layout.header)
    found = parse_header(IMAGE, file="golden", file_nbytes=len(IMAGE))
    fill_sums(header, layout.sums_at, found.sums)
    assert bytes(header) == IMAGE[: layout.data_start]
    assert saved_offsets(found, file="golden") == OFFSETS
    assert IMAGE[found.tensors["cut"].start : found.tensors["cut"].stop] == bytes(range(8))


def test_manifest_of_three_ranks() -> None:
    """Placings, replicas, the ranks of files, and what each rank has for itself."""
    manifest = decode_manifest(MANIFEST, file="golden")
    assert [(record.path, record.rank) for record in manifest.files] == [
        ("model/model-00001-of-00003.safetensors", 0),
        ("model/model-00002-of-00003.safetensors", 1),
        ("model/model-00003-of-00003.safetensors", 2),
        ("model/model-00001-of-00003.extra.safetensors", 0),
    ]
    plan = manifest.plan
    assert plan.names == ["cut", "list", "plain", "rule"]
    shardings = [sharding_of(record) for record in plan.placings if isinstance(record, ShardingRecord)]
    assert shardings == [
        Sharding((3,), (0, 1, 2), (Cut(0, 0),)),
        Sharding((3,), (2, 0, 1), (Cut(0, 1, 2),)),
        Sharding((3, 1), (0, 1, 2), ()),
    ]
    assert plan.placings[2] == "undeclared"
    assert (plan.entry_placings, plan.entry_replicas) == ([0, 1, 2, 3], [0, 0, 0, 1])
    assert plan.tree == {"model": {"cut": 0, "list": 1, "plain": 2, "rule": 3}, "lr": -1, "rng": ["own", "rng"]}
    assert manifest.own_plan_of == [0, 1, 0]
    assert manifest.rank_values == [["zero"], [], ["two"]]
    views = [plan_for(manifest, rank) for rank in range(4)]
    assert [view.plan.tree.get("rng") for view in views] == [
        {"cpu": 4, "python": -2},
        {"cpu": 4},
        {"cpu": 4, "python": -2},
        None,
    ]
    assert views[1].plan.classes[views[1].plan.entry_classes[4]] == ("U8", [16], "")


def test_writing_the_manifest_of_three_ranks() -> None:
    """From the same parts the same bytes are written."""
    assert written() == MANIFEST


def written() -> bytes:
    """Return the golden manifest as a writer of today makes it."""
    shown = (f"model/model-{rank + 1:05d}-of-00003.safetensors" for rank in range(3))
    files = [
        FileRecord(path=path, nbytes=4104, data_start=4096, sum="0" * 32, rank=rank) for rank, path in enumerate(shown)
    ]
    extra = "model/model-00001-of-00003.extra.safetensors"
    plan = Plan(
        classes=[("F32", [3, 2], ""), ("U8", [3], "")],
        names=["cut", "list", "plain", "rule"],
        entry_classes=[0, 0, 1, 0],
        entry_files=[0, 2, 3, 1],
        tree={"model": {"cut": 0, "list": 1, "plain": 2, "rule": 3}, "lr": -1, "rng": ["own", "rng"]},
        placings=[
            ShardingRecord(mesh=[3], cuts=[(0, 0, 1)], strides=[1]),
            ShardingRecord(mesh=[3], cuts=[(0, 1, 2)], ranks=[2, 0, 1]),
            "undeclared",
            ShardingRecord(mesh=[3, 1], strides=[1, 1]),
        ],
        entry_placings=[0, 1, 2, 3],
        entry_replicas=[0, 0, 0, 1],
    )
    own = [
        Plan(classes=[("U8", [size], "")], names=["cpu"], entry_classes=[0], entry_files=[0], tree=tree)
        for size, tree in ((8, {"rng": {"cpu": 0, "python": -1}}), (16, {"rng": {"cpu": 0}}))
    ]
    encoded = [encode(one) for one in (own[0], own[1], own[0])]
    return encode_manifest(
        Head(
            step=1200,
            term=7,
            ordinal=13,
            save_id="0b6f1c9e-5d2a-4f7e-9c1b-3a8d7e6f5c4b",
            world_size=3,
            nbytes=4104,
            created="2026-01-02T03:04:05+00:00",
            package="0.1.0",
        ),
        [*files, FileRecord(path=extra, nbytes=4099, data_start=4096, sum="1" * 32)],
        values=b"[0.1]",
        metadata=b"null",
        plan=encode(plan),
        own=encode_own(encoded, [b'["zero"]', b"", b'["two"]']),
    )


def encode(plan: Plan) -> bytes:
    return msgspec.json.encode(plan)
