"""The local plan: a rank's entries → folders, files, and places in the arena.

A plan depends on names, dtypes, shapes, placings and the tree alone, so a training loop makes it once: ``PlanCache``
gives the last one again while nothing of these changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from aiockpt.format.image import MAX_HEADER_NBYTES, TensorSpec
from aiockpt.format.manifest import Plan
from aiockpt.format.names import INDEX_NAME, shard_name
from aiockpt.format.tree import Node, renumber
from aiockpt.planning.body import class_columns, encoding
from aiockpt.planning.entries import (
    MAX_DATA_NBYTES,
    MAX_NAME_LENGTH,
    Entry,
    canonical_order,
    check_sizes,
    folders_of,
    name_in_file,
)
from aiockpt.planning.images import MAX_FILE_ENTRIES, ImageBuilder, LocalPlan
from aiockpt.planning.placings import Placing, intern_placings
from aiockpt.planning.ranked import plan_rank

__all__ = ["MAX_DATA_NBYTES", "MAX_FILE_ENTRIES", "MAX_NAME_LENGTH", "Entry", "LocalPlan", "PlanCache", "plan_local"]


def plan_local(
    entries: Sequence[Entry],
    tree: Node,
    plain_files: Mapping[str, bytes] | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    max_file_entries: int = MAX_FILE_ENTRIES,
    max_header_nbytes: int = MAX_HEADER_NBYTES,
) -> LocalPlan:
    """Lay out one rank's entries, without a word from the others.

    Args:
        entries: In any order; their positions are the entry numbers in ``tree``.
        tree: See ``format.tree``.
        plain_files: Further files by (encoded) path, such as ``model/config.json``; of rank 0 alone.
        rank: Of this process in the job.
        world: How many ranks the job has; with one, placings mean nothing.
        max_file_entries: Tensors of a file; a folder with more has several files.
        max_header_nbytes: Of a file, likewise.

    Raises:
        UnsupportedValueError: Two entries have the same dotted name (names both), a name cannot stand in a
            safetensors file, the tensors take more than ``MAX_DATA_NBYTES`` (names the largest), the tree is
            nested too deep, or an entry is of each rank at one place and not at another.
        ValueError: An entry's dtype and shape are none, or a plain file has the path of another file.
    """
    limits = max_file_entries, max_header_nbytes
    if world > 1:
        return plan_rank(entries, tree, plain_files or {}, rank=rank, world=world, limits=limits)
    canonical = canonical_order(entries)
    names = [name_in_file(entry.segments) for entry in entries]
    builder = ImageBuilder([TensorSpec(name, entry[1], entry[2]) for name, entry in zip(names, entries, strict=True)])
    check_sizes(entries, builder.sizes)
    members: dict[str, list[int]] = {}
    folders = folders_of(entries)
    for i in canonical:
        members.setdefault(folders[i], []).append(i)
    for folder in sorted(members):
        _add_folder(builder, names, folder, list(builder.cut(members[folder], *limits)))
    for path, content in sorted((plain_files or {}).items()):
        builder.add_plain(path, content)
    return builder.finish(_encode_plan(entries, canonical, names, builder.spec_files, tree))


class PlanCache:
    """Gives the last plan again while entries, tree and plain files stay equal.

    Equal when encoded: Python's ``==`` takes ``True`` for ``1``, and a list that was changed is still equal to itself.
    """

    def __init__(self, *, rank: int = 0, world: int = 1) -> None:
        self._rank = rank
        self._world = world
        self._encoder = msgspec.msgpack.Encoder()
        self._key = bytearray()
        self._now = bytearray()  # used again for each call: one of 0.5 MB would be mapped anew each time
        self._plan: LocalPlan | None = None
        self.misses = 0

    def plan(self, entries: Sequence[Entry], tree: Node, plain_files: Mapping[str, bytes]) -> LocalPlan:
        """Return the plan, as ``plan_local`` makes it."""
        try:
            what = entries if self._world == 1 else _columns(entries)
            self._encoder.encode_into((what, tree, plain_files), self._now)
        except (UnicodeEncodeError, RecursionError):
            return self._make(entries, tree, plain_files)  # which says what is wrong with it
        if self._plan is None or self._key != self._now:
            self._plan = self._make(entries, tree, plain_files)
            self._key, self._now = self._now, self._key
            self.misses += 1
        return self._plan

    def _make(self, entries: Sequence[Entry], tree: Node, plain_files: Mapping[str, bytes]) -> LocalPlan:
        return plan_local(entries, tree, plain_files, rank=self._rank, world=self._world)


def _columns(entries: Sequence[Entry]) -> tuple[list[object], list[int], list[Placing]]:
    """Return the entries with each placing once: at 4,096 ranks one of them takes longer to encode than all names."""
    placings, numbers = intern_placings([entry.placing for entry in entries])
    return [entry[:4] for entry in entries], numbers, placings


def _add_folder(builder: ImageBuilder, names: Sequence[str], folder: str, parts: Sequence[list[int]]) -> None:
    weights: dict[str, str] = {}
    for index, part in enumerate(parts):
        name = shard_name(index, len(parts))
        weights |= {names[i]: name for i in part}
        builder.add_image(f"{folder}/{name}", part)
    total = sum(builder.sizes[i] for part in parts for i in part)
    index_json = {"metadata": {"total_size": total}, "weight_map": weights}
    builder.add_plain(f"{folder}/{INDEX_NAME}", msgspec.json.encode(index_json))


def _encode_plan(
    entries: Sequence[Entry], canonical: Sequence[int], names: Sequence[str], files: Sequence[int], tree: Node
) -> bytes:
    classes, entry_classes = class_columns([entries[i] for i in canonical])
    numbers = [0] * len(entries)
    for number, i in enumerate(canonical):
        numbers[i] = number
    with encoding():
        return msgspec.json.encode(
            Plan(
                classes=classes,
                names=[names[i] for i in canonical],
                entry_classes=entry_classes,
                entry_files=[files[i] for i in canonical],
                tree=renumber(tree, numbers.__getitem__),
            )
        )
