"""A manifest of several ranks → the one plan that a rank reads by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from aiockpt.format.manifest import Manifest, Plan
from aiockpt.format.names import Segments
from aiockpt.format.placings import ShardingRecord
from aiockpt.format.tree import OWN, Node, fill_places, renumber

__all__ = ["RankView", "is_cut", "manifest_for", "plan_for"]


@dataclass(frozen=True, slots=True)
class RankView:
    """A checkpoint as one rank sees it: nothing in it is of each rank any more."""

    plan: Plan
    """The rank's own entries stand behind those of all, their placing is ``per_rank``."""
    values: list[Any]
    missing: list[Segments]
    """Places that were of each rank, and have nothing for this one; they are not in the tree."""


def plan_for(manifest: Manifest, rank: int) -> RankView:
    """Put what a rank had for itself into the places that wait for it.

    Args:
        manifest: Decoded, hence checked.
        rank: Of the job that reads; it may have more ranks than the one that wrote.
    """
    plan, values = manifest.plan, manifest.values
    own = _own_plan(manifest, rank)
    nodes = {} if own is None else _renumbered(own.tree, entries=len(plan.names), values=len(values))
    places = 0
    missing: list[Segments] = []

    def place(path: Segments, node: list[Any]) -> Node | None:
        nonlocal places
        places += 1
        # In the tree of one rank it stands in the tree itself.
        found = nodes.get(node[1]) if node[0] == OWN else node[1] if rank == 0 else None
        if found is None:
            missing.append(path)
        return found

    tree = fill_places(plan.tree, place)
    if not places:
        return RankView(plan, values, [])
    fields = {name: getattr(plan, name) for name in Plan.__struct_fields__} | {"tree": {} if tree is None else tree}
    if own is not None:
        files = [number for number, record in enumerate(manifest.files) if record.rank == rank and record.data_start]
        fields |= _joined_columns(plan, own, files)
        values = [*values, *manifest.rank_values[rank]]
    return RankView(Plan(**fields), values, missing)


def is_cut(plan: Plan, entry: int) -> bool:
    """Tell whether a tensor is cut over the files of several ranks."""
    record = plan.placings[plan.entry_placings[entry]] if plan.entry_placings else None
    return isinstance(record, ShardingRecord) and bool(record.cuts)


def manifest_for(manifest: Manifest, rank: int) -> Manifest:
    """Return the manifest with a plan and values in which nothing is of each rank any more, see ``plan_for``."""
    view = plan_for(manifest, rank)
    return msgspec.structs.replace(
        manifest, plan=view.plan, values=view.values, own_plans=[], own_plan_of=[], rank_values=[]
    )


def _own_plan(manifest: Manifest, rank: int) -> Plan | None:
    number = manifest.own_plan_of[rank] if rank < len(manifest.own_plan_of) else -1
    return None if number < 0 else manifest.own_plans[number]


def _renumbered(nodes: dict[str, Node], *, entries: int, values: int) -> dict[str, Node]:
    return {
        key: renumber(node, lambda number: number + entries, lambda number: number + values)
        for key, node in nodes.items()
    }


def _joined_columns(plan: Plan, own: Plan, files: Sequence[int]) -> dict[str, Any]:
    """Return the columns of all entries, the rank's own ones last; ``files`` are the rank's tensor files."""
    more = len(own.names)
    return {
        "classes": [*plan.classes, *own.classes],
        "names": [*plan.names, *own.names],
        "entry_classes": [*plan.entry_classes, *(len(plan.classes) + kind for kind in own.entry_classes)],
        "entry_files": [*plan.entry_files, *(files[file] for file in own.entry_files)],
        "placings": [*plan.placings, "per_rank"],
        "entry_placings": [*plan.entry_placings, *[len(plan.placings)] * more],
        "entry_replicas": [*plan.entry_replicas, *[0] * more],
    }
