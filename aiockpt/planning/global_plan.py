"""The global plan: what all ranks save together, checked.

It *checks*, it does not decide: what a rank stages and writes follows from its own plan alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from aiockpt.errors import PlanMismatchError, ProtocolError
from aiockpt.format.dtypes import nbytes_of
from aiockpt.format.image import MAX_HEADER_NBYTES
from aiockpt.format.manifest import FileRecord, Plan
from aiockpt.format.names import Segments, dotted
from aiockpt.format.tree import Node, children, is_blob, value_number
from aiockpt.planning.body import decode_body
from aiockpt.planning.division import first_owner
from aiockpt.planning.images import MAX_FILE_ENTRIES
from aiockpt.planning.merge_entries import EntryMerger, Said
from aiockpt.planning.merge_trees import ContradictionError, TreeMerger
from aiockpt.planning.merge_values import join_values
from aiockpt.planning.mismatch import mismatch, ranks_text
from aiockpt.planning.placings import sharding_record
from aiockpt.planning.sharding import Sharding
from aiockpt.planning.shares import share_out
from aiockpt.planning.whereabouts import FileTable

__all__ = ["GlobalPlan", "merge"]


def merge(
    bodies: Mapping[str, bytes],
    ranks_of: Mapping[str, Sequence[int]],
    *,
    world: int,
    limits: tuple[int, int] = (MAX_FILE_ENTRIES, MAX_HEADER_NBYTES),
) -> GlobalPlan:
    """Make one plan of what the ranks said, or say who contradicts whom.

    Args:
        bodies: The distinct ones by digest.
        ranks_of: By digest, the ranks that said it; each rank once.
        world: How many ranks there are.
        limits: As ``plan_local`` had them: entries and header bytes of a file.

    Raises:
        PlanMismatchError: One name has different dtypes, shapes, placings or places in the state, or a tensor is not
            on all ranks of its mesh, or on one outside of it.
        ProtocolError: Bytes that are no body.
    """
    if sorted(rank for digest in bodies for rank in ranks_of[digest]) != list(range(world)):
        raise ValueError(f"not each of {world} ranks has one body")
    said = [
        Said(digest, decode_body(data, world=world), tuple(sorted(ranks_of[digest]))) for digest, data in bodies.items()
    ]
    said.sort(key=lambda one: one.ranks[0])
    entries = EntryMerger(said)
    for number, one in enumerate(said):
        entries.add(number, one)
    entries.check_holders()
    return GlobalPlan(said, entries, _merged_trees(said, entries), limits=limits)


class GlobalPlan:
    """What ``merge`` made; entries and values are numbered anew, each once.

    Args:
        said: The distinct bodies, that of the lowest rank first.
        entries: All of them, checked.
        trees: All of them.
        limits: Entries and header bytes of a file.
    """

    def __init__(
        self, said: Sequence[Said], entries: EntryMerger, trees: TreeMerger, *, limits: tuple[int, int]
    ) -> None:
        self._said = said
        self._entries = entries
        self._trees = trees
        self._limits = limits
        sizes = [nbytes_of(dtype, shape) for dtype, shape, _ in entries.classes]
        self._sizes = [sizes[kind] for kind in entries.entry_classes]
        self._replicas = share_out(entries.keys, self._sizes, entries.placings, entries.entry_placings)
        self._writers = self._find_writers()
        self.folders: tuple[str, ...] = tuple(sorted({folder for one in said for folder in one.body.folders}))
        """Those that need an index. What ranks have for themselves may stand in others."""
        self._extra = {
            (self._writers[entry], key[0])
            for entry, (key, placing) in enumerate(zip(entries.keys, entries.entry_placings, strict=True))
            if entries.placings[placing] is None
        }

    def writes_extra(self, rank: int, folder: str) -> bool:
        """Tell whether the extra files of a rank in a folder are needed: no lower rank has all that is in them."""
        return (rank, folder) in self._extra

    def extra_folders(self) -> dict[int, list[str]]:
        """Return by rank the folders in which its extra files are needed."""
        found: dict[int, list[str]] = {}
        for rank, folder in sorted(self._extra):
            found.setdefault(rank, []).append(folder)
        return found

    def encode(self, files: Sequence[FileRecord]) -> bytes:
        """Return the manifest's ``plan``.

        Args:
            files: All of the checkpoint, as the manifest will have them; those of a rank in the order of its plan.

        Raises:
            ValueError: A rank has no file for something that it writes.
        """
        entries = self._entries
        plan = Plan(
            classes=[(dtype, list(shape), mark) for dtype, shape, mark in entries.classes],
            names=[name for _, name in entries.keys],
            entry_classes=entries.entry_classes,
            entry_files=self._files_of_entries(files),
            tree=self._trees.tree,
            placings=[
                sharding_record(placing) if isinstance(placing, Sharding) else "undeclared"
                for placing in entries.placings
            ],
            entry_placings=entries.entry_placings,
            entry_replicas=self._replicas,
        )
        return msgspec.json.encode(plan)

    def index_json(self, folder: str, files: Sequence[FileRecord]) -> bytes:
        """Return the index of a folder that other libraries look for, each name with the file where it begins."""
        names = [record.path.rpartition("/")[2] for record in files]
        numbers = self._files_of_entries(files)
        mine = [entry for entry, key in enumerate(self._entries.keys) if key[0] == folder]
        return msgspec.json.encode(
            {
                "metadata": {"total_size": sum(self._sizes[entry] for entry in mine)},
                "weight_map": {self._entries.keys[entry][1]: names[numbers[entry]] for entry in mine},
            }
        )

    def check_values(self, by_digest: Mapping[str, Mapping[int, bytes]]) -> None:
        """See that ranks with one plan have one list of values.

        Args:
            by_digest: By plan and rank, for one rank of each kind: a JSON array as in ``merge_values``.

        Raises:
            PlanMismatchError: Two of them have different values at one place; names it.
            ProtocolError: One has not as many values as its plan says.
        """
        for body, one in enumerate(self._said):
            first, *others = sorted(by_digest[one.digest].items())
            for other in others:
                if other[1] != first[1]:
                    self._refuse_differing(body, first, other)

    def _refuse_differing(self, body: int, first: tuple[int, bytes], other: tuple[int, bytes]) -> None:
        pairs = zip(*(_decode_values(data, self._said[body]) for _, data in (first, other)), strict=True)
        for at, (value, value_there) in enumerate(pairs):
            if bytes(value) != bytes(value_there):
                number = next(n for n, sources in enumerate(self._trees.sources) if (body, at) in sources)
                path = self._value_paths()[number]
                raise _differing(path, (bytes(value), bytes(value_there)), ([first[0]], [other[0]]))

    def merge_values(self, by_digest: Mapping[str, bytes]) -> bytes:
        """Return the manifest's ``values``.

        Args:
            by_digest: Of each distinct body the values that one of its ranks has in common with the others, as a JSON
                array; whether the others have the same is for the caller to compare.

        Raises:
            PlanMismatchError: Two of them have different values at one place; names it.
            ProtocolError: One has not as many values as its plan says.
        """
        if len(self._said) == 1:
            return by_digest[self._said[0].digest]
        lists = [_decode_values(by_digest[one.digest], one) for one in self._said]
        paths: dict[int, Segments] = {}
        merged = []
        for number, sources in enumerate(self._trees.sources):
            found = [bytes(lists[body][at]) for body, at in sources]
            if found.count(found[0]) < len(found):
                paths = paths or self._value_paths()
                joined = join_values(found, paths[number], is_metadata=number in self._trees.metadata)
                if isinstance(joined, int):
                    ranks = self._said[sources[0][0]].ranks, self._said[sources[joined][0]].ranks
                    raise _differing(paths[number], (found[0], found[joined]), ranks)
                found[0] = joined
            merged.append(found[0])
        return b"[" + b",".join(merged) + b"]"

    def _find_writers(self) -> list[int]:
        """Return by entry the rank that writes its first part."""
        entries = self._entries
        known: dict[tuple[int, int], int] = {}
        writers = []
        for entry, case in enumerate(zip(entries.entry_placings, self._replicas, strict=True)):
            placing = entries.placings[case[0]]
            if not isinstance(placing, Sharding):
                writers.append(entries.first_rank(entry))
                continue
            if case not in known:
                known[case] = first_owner(placing, case[1])
            writers.append(known[case])
        return writers

    def _files_of_entries(self, files: Sequence[FileRecord]) -> list[int]:
        table = FileTable(files, self._limits)
        said_by = {rank: one for one in self._said for rank in one.ranks}
        entries = self._entries
        return [
            table.find(key, rank, said_by[rank], extra=entries.placings[placing] is None)
            for key, rank, placing in zip(entries.keys, self._writers, entries.entry_placings, strict=True)
        ]

    def _value_paths(self) -> dict[int, Segments]:
        """Return where each value stands in the tree."""
        paths: dict[int, Segments] = {}

        def note(node: Node, path: Segments) -> None:
            if isinstance(node, int):
                if node < 0:
                    paths[value_number(node)] = path
                return
            if is_blob(node):
                return
            if isinstance(node, list) and node[0] == "module" and node[2] is not None:
                paths[value_number(node[2])] = (*path, "_metadata")
            for segment, child in children(node):
                note(child, (*path, segment))

        note(self._trees.tree, ())
        return paths


def _differing(
    path: Segments, values: tuple[bytes, bytes], ranks: tuple[Sequence[int], Sequence[int]]
) -> PlanMismatchError:
    texts = [
        value.decode() if len(value) <= _SHOWN else f"{value[:_SHOWN].decode(errors='replace')}…" for value in values
    ]
    who = [ranks_text(some[:1]) for some in ranks]
    why = f"it is {texts[0]} on {who[0]}, and {texts[1]} on {who[1]}"
    return mismatch(dotted(path), why, ranks=ranks[1], next="save the same value on all ranks")


def _merged_trees(said: Sequence[Said], entries: EntryMerger) -> TreeMerger:
    merger = TreeMerger(entries.name)
    for number, one in enumerate(said):
        try:
            merger.add(number, one.body.tree, entries.numbers[number])
        except ContradictionError as exc:
            why = f"it is {exc.first} on lower ranks, and {exc.second} on {ranks_text(one.ranks)}"
            raise mismatch(dotted(exc.path), why, ranks=one.ranks, next="give it one type on all ranks") from exc
    return merger


def _decode_values(data: bytes, one: Said) -> list[msgspec.Raw]:
    try:
        values = _values.decode(data)
    except ValueError as exc:
        raise ProtocolError("a rank sent values that are no JSON", why=str(exc)) from exc
    if len(values) != one.body.values:
        raise ProtocolError(f"a rank sent {len(values)} values, its plan has {one.body.values}")
    return values


_values = msgspec.json.Decoder(list[msgspec.Raw])
_SHOWN = 80
"""Bytes of a value in a message."""
