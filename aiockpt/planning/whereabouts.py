"""In which file each entry begins: from the rank that writes it, and the files that this rank made."""

from __future__ import annotations

from collections.abc import Sequence

from aiockpt.format.image import TensorSpec
from aiockpt.format.manifest import FileRecord
from aiockpt.format.names import EXTRA
from aiockpt.planning.division import divide
from aiockpt.planning.images import ImageBuilder
from aiockpt.planning.merge_entries import Said
from aiockpt.planning.parts import PartList

__all__ = ["FileTable"]


class FileTable:
    """The tensor files of a checkpoint by folder and rank.

    Args:
        files: All of them, those of a rank in the order of its plan.
        limits: Entries and header bytes of a file, as the ranks had them.
    """

    def __init__(self, files: Sequence[FileRecord], limits: tuple[int, int]) -> None:
        self._limits = limits
        self._tables: tuple[dict[tuple[str, int], list[int]], ...] = {}, {}
        self._positions: dict[tuple[str, int, bool], dict[str, int]] = {}
        for number, record in enumerate(files):
            if record.data_start:
                folder, _, name = record.path.rpartition("/")
                self._tables[EXTRA in name].setdefault((folder, record.rank), []).append(number)

    def find(self, key: tuple[str, str], rank: int, said: Said, *, extra: bool) -> int:
        """Return the index of the file where ``rank``, which said ``said``, begins the entry with folder and name.

        Raises:
            ValueError: It has no such file.
        """
        folder, name = key
        files = self._tables[extra].get((folder, rank))
        if files is None:
            raise ValueError(f"rank {rank} has no tensor file in {folder!r}, its plan has {name!r} there")
        if len(files) == 1:
            return files[0]
        case = folder, rank, extra
        if case not in self._positions:
            self._positions[case] = self._positions_of(folder, rank, said, extra=extra)
        return files[self._positions[case][name]]

    def _positions_of(self, folder: str, rank: int, said: Said, *, extra: bool) -> dict[str, int]:
        """Return by name in which of the rank's files of a folder an entry begins: they are planned once more."""
        columns, body = said.columns, said.body
        kinds = [(dtype, tuple(shape)) for dtype, shape, _ in body.classes]
        specs = [TensorSpec(name, *kinds[kind]) for name, kind in zip(body.names, body.entry_classes, strict=True)]
        parts = PartList(specs, [at for at, _ in columns.keys], self._limits)
        if extra:
            for entry, placing in enumerate(body.entry_placings):
                if body.placings[placing] is None:
                    parts.add_whole(entry, extra=True)
        else:
            for depth, blocks in enumerate(divide(columns, columns.replicas(), rank)):
                for block in blocks:
                    parts.add_block(block.entry, block, depth)
        builder = ImageBuilder(parts.specs)
        files = parts.extra_files(builder, folder) if extra else parts.main_files(builder, folder)
        found: dict[str, int] = {}
        for position, members in enumerate(files):
            for part in members:
                found.setdefault(parts.specs[part].name, position)
        return found
