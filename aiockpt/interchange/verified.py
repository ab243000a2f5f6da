"""The bytes of a checkpoint's tensors, each block verified before a byte of it is handed out."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from aiockpt.errors import CheckpointCorruptError
from aiockpt.format.image import BLOCK_NBYTES
from aiockpt.format.names import MANIFEST_NAME
from aiockpt.format.ranks import is_cut, plan_for
from aiockpt.storage.readers import AlignedBuffer, OpenCheckpoint

__all__ = ["Span", "VerifiedBytes"]

_MOST_BUFFERS = 4
"""Files of which a block is held at once; a part of a state has one file, or few."""


class Span(NamedTuple):
    """Where a tensor lies: ``[start, stop)`` in bytes of a file, which goes by its number in the manifest."""

    file: int
    start: int
    stop: int


class VerifiedBytes:
    """Reads blocks by direct I/O, and keeps the last one of some files.

    Args:
        checkpoint: Open for as long as this object is used.
        on_progress: Called with the bytes that were handed out since the last call.
    """

    def __init__(self, checkpoint: OpenCheckpoint, on_progress: Callable[[int], None]) -> None:
        self._checkpoint = checkpoint
        self._on_progress = on_progress
        self._plan = plan_for(checkpoint.manifest, 0).plan
        self._held: OrderedDict[int, tuple[int, AlignedBuffer]] = OrderedDict()

    def is_cut(self, entry: int) -> bool:
        """Tell whether a tensor is cut over the files of several ranks."""
        return is_cut(self._plan, entry)

    def content(self, entry: int) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in order; one that is cut is held in memory meanwhile. Errors as of ``pieces``.

        Each view is valid until the next one is asked for.
        """
        if not self.is_cut(entry):
            yield from self.pieces(self.span(entry))
            return
        from aiockpt.restoring.checkpoint_view import CheckpointView  # these import torch, other exports need none
        from aiockpt.restoring.load import read_entry

        checkpoint = self._checkpoint
        view = CheckpointView(checkpoint.manifest, f"{checkpoint.path}/{MANIFEST_NAME}")
        tensor = read_entry(checkpoint, view, entry)
        nbytes = tensor.numel() * tensor.element_size()
        if not nbytes:
            return
        data = memoryview((ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr())).cast("B")
        for start in range(0, nbytes, BLOCK_NBYTES):
            piece = data[start : start + BLOCK_NBYTES]
            yield piece
            self._on_progress(len(piece))

    def span(self, entry: int) -> Span:
        """Return where a tensor lies that is not cut.

        Raises:
            CheckpointCorruptError: The header is not the one that was written, or contradicts the manifest.
            StorageError: The header cannot be read.
        """
        plan = self._plan
        file, name = plan.entry_files[entry], plan.names[entry]
        dtype, shape, _ = plan.classes[plan.entry_classes[entry]]
        record = self._checkpoint.manifest.files[file]
        stored = self._checkpoint.header(file).tensors.get(name) if record.data_start else None
        if stored is None or stored.dtype != dtype or stored.shape != tuple(shape):
            raise CheckpointCorruptError(
                f"{self._checkpoint.path}/{record.path} is not what the manifest says",
                why=f"{name!r:.200} should be {dtype} {list(shape)} in it",
                next="export another step",
                step=self._checkpoint.manifest.head.step,
                file=f"{self._checkpoint.path}/{record.path}",
            )
        return Span(file, stored.start, stored.stop)

    def pieces(self, span: Span) -> Iterator[memoryview]:
        """Yield the bytes of a span in order; each view is valid until the next one is asked for.

        Raises:
            CheckpointCorruptError: A block is not the one that was written.
            StorageError: A block cannot be read.
        """
        reader = self._checkpoint.file(span.file)
        data_start, size = reader.record.data_start, reader.block_nbytes
        position = span.start
        while position < span.stop:
            number = (position - data_start) // size
            block_start, block_stop = reader.block_range(number)
            stop = min(span.stop, block_stop)
            yield self._block(span.file, number)[position - block_start : stop - block_start]
            self._on_progress(stop - position)
            position = stop

    def plain(self, file: int) -> bytes:
        """Return the content of a plain file.

        Raises:
            CheckpointCorruptError: It is not the one that was written.
            StorageError: It cannot be read.
        """
        reader = self._checkpoint.file(file)
        buffer = AlignedBuffer(reader.nbytes)
        reader.check_content(buffer)
        return bytes(buffer.view[: reader.nbytes])

    def _block(self, file: int, number: int) -> memoryview:
        reader = self._checkpoint.file(file)
        start, stop = reader.block_range(number)
        held, buffer = self._held.pop(file, (-1, None))
        if buffer is None or buffer.nbytes < stop - start:
            buffer = self._other_buffer(stop - start)
        if held != number:
            reader.read_block(number, buffer)
        self._held[file] = number, buffer
        return buffer.view[: stop - start]

    def _other_buffer(self, nbytes: int) -> AlignedBuffer:
        if len(self._held) >= _MOST_BUFFERS:
            _, (_, buffer) = self._held.popitem(last=False)
            if buffer.nbytes >= nbytes:
                return buffer
        return AlignedBuffer(nbytes)
