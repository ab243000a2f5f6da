"""The entries of several bodies → one of each: equal names must be equal tensors, on the ranks of their mesh."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from aiockpt.errors import PlanMismatchError
from aiockpt.format.names import dotted
from aiockpt.format.tree import walk
from aiockpt.planning.body import Body, Columns
from aiockpt.planning.entries import name_in_file
from aiockpt.planning.mismatch import mismatch, ranks_text
from aiockpt.planning.placings import intern_placings
from aiockpt.planning.sharding import Sharding

__all__ = ["EntryMerger", "Said"]


@dataclass(frozen=True, slots=True)
class Said:
    """One of the distinct bodies, and the ranks that said it."""

    digest: str
    columns: Columns
    ranks: tuple[int, ...]
    """Rising."""

    @property
    def body(self) -> Body:
        """What was said."""
        return self.columns.body


class EntryMerger:
    """Takes one body after the other, that of the lowest rank first.

    Entries that the same bodies have are checked together, so the work grows with what differs and not with the ranks.
    """

    def __init__(self, said: Sequence[Said]) -> None:
        self._said = said
        self.keys: list[tuple[str, str]] = []
        """By entry: folder and name."""
        self.classes: dict[tuple[str, tuple[int, ...], str], int] = {}
        self.entry_classes: list[int] = []
        self.entry_placings: list[int] = []
        self.numbers: list[list[int]] = []
        """By body: the common numbers of its entries."""
        self._bodies: list[int] = []
        """By entry: bit ``n`` says that body ``n`` has it."""
        self._at: dict[tuple[str, str], int] = {}
        self.placings, numbers = intern_placings([placing for one in said for placing in one.columns.placings])
        left = iter(numbers)
        self._placing_numbers = [[next(left) for _ in one.columns.placings] for one in said]

    def add(self, number: int, one: Said) -> None:
        """Take in the entries of body ``number``.

        Raises:
            PlanMismatchError: One of them is another tensor than that of an earlier body.
        """
        body = one.body
        kinds = [
            self.classes.setdefault((dtype, tuple(shape), mark), len(self.classes))
            for dtype, shape, mark in body.classes
        ]
        placings = self._placing_numbers[number]
        bit, at, mine = 1 << number, self._at, []
        for key, kind, placing in zip(one.columns.keys, body.entry_classes, body.entry_placings, strict=True):
            entry = at.setdefault(key, len(self.keys))
            mine.append(entry)
            if entry == len(self.keys):
                self.keys.append(key)
                self.entry_classes.append(kinds[kind])
                self.entry_placings.append(placings[placing])
                self._bodies.append(bit)
            elif self.entry_classes[entry] != kinds[kind] or self.entry_placings[entry] != placings[placing]:
                raise self._differing(entry, one, kinds[kind], placings[placing])
            else:
                self._bodies[entry] |= bit
        self.numbers.append(mine)

    def check_holders(self) -> None:
        """Check that the ranks that have a sharded tensor are those of its mesh.

        Raises:
            PlanMismatchError: Names a tensor with a hole, or one that stands outside of its mesh.
        """
        first: dict[tuple[int, int], int] = {}
        for entry, case in enumerate(zip(self._bodies, self.entry_placings, strict=True)):
            first.setdefault(case, entry)
        for (bodies, number), entry in first.items():
            placing = self.placings[number]
            if not isinstance(placing, Sharding):
                continue
            holders, mesh = set(self._ranks(bodies)), set(placing.ranks)
            # A mesh of one rank says whose tensor it is that counts; others have their own, which nobody compares.
            if holders == mesh or (len(mesh) == 1 and mesh < holders):
                continue
            missing, outside = mesh - holders, holders - mesh
            who = f"missing on {ranks_text(missing)}" if missing else f"on {ranks_text(outside)} too"
            why = f"its mesh has {ranks_text(mesh)}, and it is {who}"
            next = "save it on all ranks of its mesh, and only there"
            raise mismatch(self.name(entry), why, ranks=missing or outside, next=next)

    def first_rank(self, entry: int) -> int:
        """Return the lowest rank that has an entry."""
        return self._said[self._first_body(entry)].ranks[0]

    def name(self, entry: int) -> str:
        """Return the dotted name of an entry, for people: in its file the first key is that of the folder."""
        folder, name = self.keys[entry]
        number = self._first_body(entry)
        columns = self._said[number].columns
        local = columns.keys.index((folder, name))
        for path, leaf in walk(columns.body.tree):
            if (leaf[1] if isinstance(leaf, list) else leaf) == local and name_in_file(path) == name:
                return dotted(path)
        return f"{folder}.{name}"

    def _first_body(self, entry: int) -> int:
        bodies = self._bodies[entry]
        return (bodies & -bodies).bit_length() - 1

    def _ranks(self, bodies: int) -> Iterator[int]:
        return (rank for number, one in enumerate(self._said) if bodies >> number & 1 for rank in one.ranks)

    def _differing(self, entry: int, one: Said, kind: int, placing: int) -> PlanMismatchError:
        first = ranks_text(self._ranks(self._bodies[entry]))
        known = self._form(self.entry_classes[entry], self.entry_placings[entry])
        why = f"it is {known} on {first}, and {self._form(kind, placing)} on {ranks_text(one.ranks)}"
        return mismatch(self.name(entry), why, ranks=one.ranks)

    def _form(self, kind: int, number: int) -> str:
        """Return what a tensor is, for people."""
        dtype, shape, mark = list(self.classes)[kind]
        placing = self.placings[number]
        text = f"{'complex ' if mark else ''}{dtype} {list(shape)}"
        if not isinstance(placing, Sharding):
            return f"{text} without a placement"
        cuts = ", ".join(f"dimension {cut.dim} by mesh dimension {cut.mesh_dim}" for cut in placing.cuts)
        how = f"cut in {cuts}" if cuts else "replicated"
        return f"{text}, {how} on a mesh {list(placing.mesh)} of {ranks_text(placing.ranks)}"
