"""Where a tensor's bytes lie in a checkpoint: in one file, or cut over those of several ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from aiockpt.format.dtypes import BITS
from aiockpt.format.image import Header, Stored
from aiockpt.format.offsets import saved_offsets
from aiockpt.planning.sharding import Chunk, Sharding
from aiockpt.restoring.boxes import Box, Transfer, transfer, whole
from aiockpt.restoring.checkpoint_view import CheckpointView, folder_of
from aiockpt.restoring.regions import Region, boxes_of
from aiockpt.storage.readers import OPEN_AT_ONCE, OpenCheckpoint

__all__ = ["Read", "Sources"]


class Read(NamedTuple):
    """What one block of a tensor in a file gives to a region."""

    file: int
    """Number in the manifest."""
    start: int
    """Of the stored block, in bytes of the file."""
    part: Transfer
    """From that block into the region's memory, as if that were row-major."""


class _Overlap(NamedTuple):
    coordinate: tuple[int, ...]
    chunk: Chunk
    parts: list[Transfer]


class Sources:
    """Answers which bytes of which files a region needs; looks into the headers of these files alone.

    Args:
        checkpoint: Open for as long as this object is used.
        view: Of the same checkpoint.
    """

    def __init__(self, checkpoint: OpenCheckpoint, view: CheckpointView) -> None:
        self._checkpoint = checkpoint
        self._view = view
        self._files: dict[tuple[str, int], list[int]] = {}
        """By folder and rank: the numbers of the tensor files, in the order in which they were planned."""
        self._offsets: dict[int, dict[str, tuple[int, ...]]] = {}
        self._headers: dict[int, Header] = {}
        self._overlaps: dict[tuple[object, ...], list[_Overlap]] = {}
        self._holders: dict[tuple[int, tuple[int, ...]], list[int]] = {}

    def reads(self, entry: int, region: Region) -> Iterator[Read]:
        """Yield what an entry's bytes in files give to a region that has elements.

        Raises:
            CheckpointCorruptError: A header is not the one that was written, or contradicts the manifest.
            StorageError: A header cannot be read.
        """
        sharding = self._view.sharding_of(entry)
        if sharding is None:
            yield from self._from_one_file(entry, region)
        else:
            yield from self._from_many_files(entry, region, sharding)

    def _from_one_file(self, entry: int, region: Region) -> Iterator[Read]:
        file = self._view.file_of(entry)
        start, stop = self._view.span(entry, self._header(file))
        if region.chunks is None:
            yield Read(file, start, Transfer(0, 0, stop - start))
            return
        code, shape, mark = self._view.stored_form(entry)
        for box in boxes_of(region, code, mark, shape):
            part = transfer(whole(shape), box, bits=BITS[code])
            if part is not None:
                yield Read(file, start, part)

    def _from_many_files(self, entry: int, region: Region, sharding: Sharding) -> Iterator[Read]:
        plan = self._view.plan
        placing, replica = plan.entry_placings[entry], plan.entry_replicas[entry]
        for coordinate, chunk, parts in self._overlapping(entry, region, sharding):
            holders = self._holders.get((placing, coordinate))
            if holders is None:
                holders = self._holders[placing, coordinate] = sharding.holders(coordinate)
            file, stored = self._find(entry, holders[replica % len(holders)], chunk)
            for part in parts:
                yield Read(file, stored.start, part)

    def _overlapping(self, entry: int, region: Region, sharding: Sharding) -> list[_Overlap]:
        """Return what the chunks of a tensor and a region have in common; the same for all tensors of one kind."""
        plan = self._view.plan
        case = plan.entry_classes[entry], plan.entry_placings[entry], region.chunks, tuple(region.memory.shape)
        found = self._overlaps.get(case)
        if found is None:
            code, shape, mark = self._view.stored_form(entry)
            boxes = boxes_of(region, code, mark, shape)
            found = self._overlaps[case] = [
                _Overlap(coordinate, chunk, parts)
                for coordinate in _coordinates(sharding)
                for chunk in sharding.chunks(shape, coordinate)
                if (parts := _parts(chunk, boxes, BITS[code]))
            ]
        return found

    def _find(self, entry: int, rank: int, chunk: Chunk) -> tuple[int, Stored]:
        """Return the file that a rank wrote a chunk to, and where it stands there."""
        view = self._view
        name, code = view.plan.names[entry], view.stored_form(entry)[0]
        for file in self._files_of(folder_of(view.manifest.files[view.file_of(entry)].path), rank):
            header = self._header(file)
            stored = header.tensors.get(name)
            if stored is None or stored.dtype != code or stored.shape != chunk.shape:
                continue
            if self._offsets_in(file, header).get(name, (0,) * len(chunk.shape)) == chunk.offsets:
                return file, stored
        raise view.corrupt(
            f"the files of rank {rank} have no part of {name!r} that is {code} {list(chunk.shape)}"
            f" and begins at {list(chunk.offsets)}"
        )

    def _files_of(self, folder: str, rank: int) -> list[int]:
        if not self._files:
            for number, record in enumerate(self._view.manifest.files):
                if record.data_start:
                    self._files.setdefault((folder_of(record.path), record.rank), []).append(number)
        return self._files.get((folder, rank), [])

    def _header(self, file: int) -> Header:
        header = self._headers.get(file)
        if header is None:
            header = self._headers[file] = self._checkpoint.header(file)
            if len(self._headers) > OPEN_AT_ONCE:
                self._checkpoint.close_file(file, keep_header=True)
        return header

    def _offsets_in(self, file: int, header: Header) -> dict[str, tuple[int, ...]]:
        offsets = self._offsets.get(file)
        if offsets is None:
            path = f"{self._checkpoint.path}/{self._view.manifest.files[file].path}"
            offsets = self._offsets[file] = saved_offsets(header, file=path)
        return offsets


def _coordinates(sharding: Sharding) -> Iterator[tuple[int, ...]]:
    """Yield a coordinate of each part, that of its first replica."""
    cut = {part.mesh_dim for part in sharding.cuts}
    return itertools.product(*(range(length if dim in cut else 1) for dim, length in enumerate(sharding.mesh)))


def _parts(chunk: Chunk, boxes: tuple[Box, ...], bits: int) -> list[Transfer]:
    source = whole(chunk.shape)._replace(offsets=chunk.offsets)
    return [part for box in boxes if (part := transfer(source, box, bits=bits)) is not None]
