"""What ranks have for themselves: in the manifest, and in the plan that a rank reads by."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from aiockpt.errors import CheckpointCorruptError
from aiockpt.format.manifest import FileRecord, Head, Manifest, Plan, decode_manifest, encode_manifest, encode_own
from aiockpt.format.placings import ShardingRecord
from aiockpt.format.ranks import plan_for

WORLD = 3
FILES = [
    FileRecord(
        path=f"{folder}/model-0000{rank + 1}-of-00003.safetensors", nbytes=4100, data_start=4096, sum="", rank=rank
    )
    for rank in range(WORLD)
    for folder in ("m", "rng")
]
PLAN = Plan(
    classes=[("F32", [4], "")],
    names=["w"],
    entry_classes=[0],
    entry_files=[2],
    tree={"m": {"w": 0}, "lr": -1, "rng": ["own", "rng"], "l": ["list", [-1, ["own", "l.1"]]]},
    placings=[ShardingRecord(mesh=[WORLD], strides=[1])],
    entry_placings=[0],
    entry_replicas=[1],
)
OWN = Plan(
    classes=[("U8", [8], "")],
    names=["cpu"],
    entry_classes=[0],
    entry_files=[1],
    tree={"rng": {"cpu": 0, "python": -1}, "l.1": ["module", {"b": ["bytes", 0]}, -2]},
)


def make(plan: Plan = PLAN, *, own_plan: Plan = OWN, **changes: Any) -> bytes:
    head = Head(step=1, term=1, ordinal=1, save_id="ab", world_size=WORLD, nbytes=0, created="", package="")
    encoded = msgspec.json.encode(own_plan)
    plans = changes.get("plans", [encoded, b"", encoded])
    values = changes.get("values", [b'["p0","m0"]', b"", b'["p2","m2"]'])
    return encode_manifest(
        changes.get("head", head),
        changes.get("files", FILES),
        values=b"[0.1]",
        metadata=b"null",
        plan=msgspec.json.encode(plan),
        own=changes.get("own", encode_own(plans, values)),
    )


def read(**changes: Any) -> Manifest:
    return decode_manifest(make(**changes), file="m")


def test_equal_plans_of_ranks_are_stored_once() -> None:
    """A manifest grows with what differs, and with each rank's values."""
    manifest = read()
    assert manifest.own_plans == [OWN]
    assert manifest.own_plan_of == [0, -1, 0]
    assert manifest.rank_values == [["p0", "m0"], [], ["p2", "m2"]]


def test_the_plan_of_a_rank() -> None:
    """One plan, numbers and files those of the manifest, each place filled."""
    view = plan_for(read(), 2)
    assert view.plan.tree == {
        "m": {"w": 0},
        "lr": -1,
        "rng": {"cpu": 1, "python": -2},
        "l": ["list", [-1, ["module", {"b": ["bytes", 1]}, -3]]],
    }
    assert view.values == [0.1, "p2", "m2"]
    assert view.missing == []
    assert view.plan.names == ["w", "cpu"]
    assert [view.plan.classes[kind] for kind in view.plan.entry_classes] == [("F32", [4], ""), ("U8", [8], "")]
    assert [FILES[file].path for file in view.plan.entry_files] == [FILES[2].path, FILES[5].path]
    assert [view.plan.placings[placing] for placing in view.plan.entry_placings] == [PLAN.placings[0], "per_rank"]
    assert view.plan.entry_replicas == [1, 0]


@pytest.mark.parametrize("rank", [1, 3, 100])
def test_a_rank_that_has_nothing(rank: int) -> None:
    """Of the job that wrote, or beyond it: its places are not in the tree, and are named."""
    view = plan_for(read(), rank)
    assert view.plan.tree == {"m": {"w": 0}, "lr": -1}
    assert view.missing == [("rng",), ("l", "1")]
    assert view.values == [0.1]
    assert view.plan.names == ["w"]


def test_a_job_of_one_rank() -> None:
    """What is its own stands in its tree, and is that of rank 0."""
    plan = Plan(classes=[], names=[], entry_classes=[], entry_files=[], tree={"rng": ["per_rank", -1], "k": -1})
    head = Head(step=1, term=1, ordinal=1, save_id="ab", world_size=1, nbytes=0, created="", package="")
    manifest = read(plan=plan, head=head, files=[], own=b"")
    assert plan_for(manifest, 0).plan.tree == {"rng": -1, "k": -1}
    assert plan_for(manifest, 1).plan.tree == {"k": -1}
    assert plan_for(manifest, 1).missing == [("rng",)]


def test_a_plan_without_places_stays() -> None:
    """Nothing is copied."""
    plan = Plan(classes=[], names=[], entry_classes=[], entry_files=[], tree={"k": -1})
    manifest = read(plan=plan, own=b"")
    assert plan_for(manifest, 1).plan is manifest.plan
    assert b"own_plans" not in make(plan=plan, plans=[b""] * 3, values=[b"[]"] * 3)


def changed(plan: Plan, **fields: Any) -> Plan:
    return msgspec.structs.replace(plan, **fields)


HOSTILE: dict[str, dict[str, Any]] = {
    "a plan that is not there": {"own": b',"own_plans":[],"own_plan_of":[0,0,0],"rank_values":[[],[],[]]'},
    "a plan below all": {"own": b',"own_plans":[],"own_plan_of":[-2,-1,-1],"rank_values":[[],[],[]]'},
    "too few ranks": {"own": b',"own_plans":[],"own_plan_of":[-1],"rank_values":[[]]'},
    "too few lists": {"own": b',"own_plans":[],"own_plan_of":[-1,-1,-1],"rank_values":[[]]'},
    "lists alone": {"own": b',"rank_values":[[],[],[]]'},
    "values that are not there": {"values": [b'["a"]', b"", b'["a","b"]']},
    "a file that is not there": {"own_plan": changed(OWN, entry_files=[2])},
    "a file below all": {"own_plan": changed(OWN, entry_files=[-1])},
    "a class that is not there": {"own_plan": changed(OWN, entry_classes=[1])},
    "an entry that is not there": {"own_plan": changed(OWN, tree={"rng": 1})},
    "no object": {"own_plan": changed(OWN, tree=["list", []])},
    "a place in a place": {"own_plan": changed(OWN, tree={"rng": ["own", "rng"]})},
    "cut over others": {"own_plan": changed(OWN, placings=["undeclared"], entry_placings=[0], entry_replicas=[0])},
    "no placings of the rest": {"plan": changed(PLAN, placings=[], entry_placings=[], entry_replicas=[])},
    "a placing that is not there": {"plan": changed(PLAN, entry_placings=[1])},
    "a placing below all": {"plan": changed(PLAN, entry_placings=[-1])},
    "a replica that is not there": {"plan": changed(PLAN, entry_replicas=[3])},
    "a replica below all": {"plan": changed(PLAN, entry_replicas=[-1])},
    "a short column": {"plan": changed(PLAN, entry_replicas=[])},
    "a mesh outside": {"plan": changed(PLAN, placings=[ShardingRecord(mesh=[3], strides=[1], first=1)])},
    "a cut of no dimension": {
        "plan": changed(PLAN, placings=[ShardingRecord(mesh=[3], strides=[1], cuts=[(0, 1, 1)])], entry_replicas=[0])
    },
    "an unknown placing": {"plan": changed(PLAN, placings=["scattered"])},
    "a file of a rank outside": {"files": [*FILES, msgspec.structs.replace(FILES[0], path="m/x", rank=3)]},
}


@pytest.mark.parametrize("case", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile(case: dict[str, Any]) -> None:
    """Checksums that are right make no truth: nothing is believed that does not fit the rest."""
    with pytest.raises(CheckpointCorruptError):
        decode_manifest(make(**case), file="m")
