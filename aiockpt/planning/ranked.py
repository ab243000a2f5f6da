"""The local plan of one rank among several: its shares and chunks, what is its own, and what nobody declared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from aiockpt.format import tree as trees
from aiockpt.format.image import TensorSpec
from aiockpt.format.manifest import Plan
from aiockpt.format.names import Segments, dotted
from aiockpt.format.tree import Node, fill_places, renumber
from aiockpt.planning.body import Body, Columns, class_columns, encoding
from aiockpt.planning.division import divide
from aiockpt.planning.entries import Entry, canonical_order, check_sizes, folders_of, key_of, name_in_file, unfit
from aiockpt.planning.images import ImageBuilder, LocalPlan
from aiockpt.planning.parts import PartList
from aiockpt.planning.placings import PER_RANK, UNDECLARED, intern_placings, sharding_record
from aiockpt.planning.sharding import Sharding

__all__ = ["plan_rank"]


def plan_rank(
    entries: Sequence[Entry],
    tree: Node,
    plain_files: Mapping[str, bytes],
    *,
    rank: int,
    world: int,
    limits: tuple[int, int],
) -> LocalPlan:
    """Lay out what one of several ranks stages, as ``plan_local``; ``limits``: entries and header bytes of a file."""
    canonical = canonical_order(entries)
    common = [i for i in canonical if entries[i].placing != PER_RANK]
    own = [i for i in canonical if entries[i].placing == PER_RANK]
    names = [name_in_file(entry.segments) for entry in entries]
    folders = folders_of(entries)
    with encoding():
        separated = _Separated(entries, common, own, tree)
        columns = _columns(entries, common, names, folders, separated)
        body = msgspec.msgpack.encode(columns.body)
    specs = [TensorSpec(name, entry.dtype, entry.shape) for name, entry in zip(names, entries, strict=True)]
    staged = PartList(specs, folders, limits)
    for depth, blocks in enumerate(divide(columns, columns.replicas(), rank)):
        for block in blocks:
            staged.add_block(common[block.entry], block, depth)
    # Behind the blocks: the global plan, which does not know them, finds in which file those are.
    own_parts = [staged.add_whole(i) for i in own]
    for i in common:
        if entries[i].placing is UNDECLARED:
            staged.add_whole(i, extra=True)
    builder = ImageBuilder(staged.specs)
    check_sizes([entries[part.entry] for part in staged.parts], builder.sizes)
    extra_files = staged.add_images(builder, rank, world)
    if rank == 0:
        for path, content in sorted(plain_files.items()):
            builder.add_plain(path, content)
    part_of = dict(zip(builder.spec_files, staged.parts, strict=True))  # one of each file
    return builder.finish(
        body,
        parts=staged.parts,
        extra_files=extra_files,
        extra_keys=[key_of(entries[part_of[file].entry]) for file in extra_files],
        own=_encode_own(entries, own, names, [builder.spec_files[part] for part in own_parts], separated.own),
        common_values=list(separated.common_values),
        own_values=list(separated.own_values),
    )


class _Separated:
    """The tree of what the ranks have in common, and the nodes of what is this rank's own."""

    def __init__(self, entries: Sequence[Entry], common: Sequence[int], own: Sequence[int], tree: Node) -> None:
        self.common_values: dict[int, int] = {}
        self.own_values: dict[int, int] = {}
        self._entries = entries
        taken: dict[str, Node] = {}

        def take(path: Segments, node: list[Any]) -> Node:
            key = dotted(path)
            while key in taken:  # another path that reads the same
                key += "'"
            taken[key] = node[1]
            return [trees.OWN, key]

        rest = fill_places(tree, take)
        self.tree = self._renumbered(rest, common, self.common_values)
        self.own = {key: self._renumbered(node, own, self.own_values) for key, node in taken.items()}

    def _renumbered(self, node: Node, members: Sequence[int], values: dict[int, int]) -> Node:
        numbers = {i: number for number, i in enumerate(members)}

        def number(i: int) -> int:
            if i not in numbers:
                key = dotted(self._entries[i].segments)
                raise unfit(key, "it is each rank's own at one place, and common to all at another", "save a copy")
            return numbers[i]

        return renumber(node, number, lambda value: values.setdefault(value, len(values)))


def _columns(
    entries: Sequence[Entry],
    common: Sequence[int],
    names: Sequence[str],
    folders: Sequence[str],
    separated: _Separated,
) -> Columns:
    members = [entries[i] for i in common]
    classes, entry_classes = class_columns(members)
    placings, entry_placings = intern_placings([entry.placing for entry in members])
    folder_numbers = {folder: number for number, folder in enumerate(sorted({folders[i] for i in common}))}
    body = Body(
        classes=classes,
        placings=[sharding_record(placing) if isinstance(placing, Sharding) else None for placing in placings],
        folders=list(folder_numbers),
        names=[names[i] for i in common],
        entry_classes=entry_classes,
        entry_placings=entry_placings,
        entry_folders=[folder_numbers[folders[i]] for i in common],
        values=len(separated.common_values),
        tree=separated.tree,
    )
    _refuse_halved_bytes(members, body)
    return Columns(body, placings)


def _refuse_halved_bytes(members: Sequence[Entry], body: Body) -> None:
    """Two elements of float4 are a byte: torch cuts bytes, we would cut elements."""
    for entry, placing in zip(members, body.entry_placings, strict=True):
        record = body.placings[placing]
        if entry.dtype == "F4" and record is not None and any(cut[1] == len(entry.shape) - 1 for cut in record.cuts):
            raise unfit(dotted(entry.segments), "float4 is cut in its last dimension", "shard another dimension")


def _encode_own(
    entries: Sequence[Entry], own: Sequence[int], names: Sequence[str], files: Sequence[int], nodes: dict[str, Node]
) -> bytes:
    if not nodes:
        return b""
    classes, entry_classes = class_columns([entries[i] for i in own])
    plan = Plan(
        classes=classes,
        names=[names[i] for i in own],
        entry_classes=entry_classes,
        entry_files=list(files),
        tree=nodes,
    )
    with encoding():
        return msgspec.json.encode(plan)
