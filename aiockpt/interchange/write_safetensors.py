"""A plain safetensors set, streamed out of a checkpoint: one file, or shards with an index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from aiockpt.errors import ConfigError
from aiockpt.format.dtypes import nbytes_of
from aiockpt.format.image import BLOCK_NBYTES, MAX_HEADER_NBYTES, ImageLayout, TensorSpec, lay_out, round_up
from aiockpt.format.manifest import Manifest
from aiockpt.format.names import INDEX_NAME, shard_name
from aiockpt.interchange.pick import Picked
from aiockpt.interchange.verified import VerifiedBytes
from aiockpt.storage.direct import FileWriter, write_small
from aiockpt.storage.readers import AlignedBuffer

__all__ = ["SINGLE_NAME", "TensorFile", "cut", "write_index", "write_tensors"]

SINGLE_NAME = "model.safetensors"
"""What transformers looks for where there is one file; no index stands beside it."""


class TensorFile(NamedTuple):
    """One file of the set."""

    entries: list[int]
    """Of the checkpoint, by their places in ``specs``."""
    specs: list[TensorSpec]
    nbytes: int
    """Of its tensors."""


def cut(manifest: Manifest, picked: Picked, *, max_nbytes: int | None) -> list[TensorFile]:
    """Return the files of a set, in the order of the state; no tensor is cut.

    Args:
        manifest: Of the checkpoint.
        picked: Its tensors.
        max_nbytes: Of the tensors of a file; a larger tensor has a file of its own. None: there is but one file.
    """
    plan = manifest.plan
    files = [TensorFile([], [], 0)]
    header_nbytes = 0
    for name, entry in picked.tensors:
        dtype, shape, _ = plan.classes[plan.entry_classes[entry]]
        spec = TensorSpec(name, dtype, tuple(shape))
        nbytes = nbytes_of(dtype, shape)
        claim = len(msgspec.json.encode(spec)) + 64
        last = files[-1]
        is_full = max_nbytes is not None and (
            last.nbytes + nbytes > max_nbytes or header_nbytes + claim > MAX_HEADER_NBYTES
        )
        if last.entries and is_full:
            last = TensorFile([], [], 0)
            files.append(last)
            header_nbytes = 0
        last.entries.append(entry)
        last.specs.append(spec)
        files[-1] = last._replace(nbytes=last.nbytes + nbytes)
        header_nbytes += claim
    return files


def write_tensors(
    dir_fd: int, name: str, file: TensorFile, source: VerifiedBytes, *, aliases: dict[str, str], label: str
) -> None:
    """Write one file, durably.

    Args:
        dir_fd: Of the directory.
        name: Of the file in it.
        file: What it holds.
        source: Where the bytes come from.
        aliases: Further names of tied tensors, noted in the header as ``safetensors.torch.save_model`` does.
        label: The path that it will have, for errors.

    Raises:
        ConfigError: No reader would take so long a header.
        CheckpointError: As ``VerifiedBytes``; StorageError where it cannot be written.
    """
    held = {spec.name for spec in file.specs}
    notes = {alias: kept for alias, kept in aliases.items() if kept in held and alias != "format"}
    try:
        image = lay_out(file.specs, notes, with_sums=False)
    except ValueError as exc:
        raise ConfigError(
            f"{label} was not written",
            why=str(exc),
            next="export to a directory, which may have several files",
            argument="to",
            path=label,
        ) from exc
    writer = FileWriter.create(dir_fd, name, image.nbytes)
    try:
        blocks = _Blocks(writer)
        for piece in _content(image, file.entries, source):
            blocks.take(piece)
        blocks.flush()
        writer.finish()
    finally:
        writer.abort()


def _content(image: ImageLayout, entries: Sequence[int], source: VerifiedBytes) -> Iterator[memoryview]:
    yield memoryview(image.header)
    for position in image.order:
        yield from source.content(entries[position])


class _Blocks:
    """Collects bytes into aligned blocks, and writes each when it is full."""

    def __init__(self, writer: FileWriter) -> None:
        self._writer = writer
        self._buffer = AlignedBuffer(min(BLOCK_NBYTES, round_up(writer.nbytes)))
        self._filled = 0
        self._offset = 0

    def take(self, piece: memoryview) -> None:
        done = 0
        while done < len(piece):
            count = min(len(piece) - done, self._buffer.nbytes - self._filled)
            self._buffer.view[self._filled : self._filled + count] = piece[done : done + count]
            self._filled += count
            done += count
            if self._filled == self._buffer.nbytes:
                self.flush()

    def flush(self) -> None:
        if self._filled:
            # The tail is padded with what was in the buffer; finishing cuts the file to its size.
            self._writer.write(self._buffer.view[: round_up(self._filled)], self._offset)
            self._offset += self._filled
            self._filled = 0


def write_index(dir_fd: int, files: Sequence[TensorFile]) -> str:
    """Write which tensor is in which shard, durably; returns the name of the file.

    Raises:
        StorageError: It cannot be written.
    """
    weights = {spec.name: shard_name(index, len(files)) for index, file in enumerate(files) for spec in file.specs}
    total = sum(file.nbytes for file in files)
    write_small(dir_fd, INDEX_NAME, msgspec.json.encode({"metadata": {"total_size": total}, "weight_map": weights}))
    return INDEX_NAME
