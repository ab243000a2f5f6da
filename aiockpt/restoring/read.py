"""Blocks of a checkpoint → memory: direct reads by a few threads, each block verified before a byte of it is used."""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from aiockpt.errors import RestoreError
from aiockpt.restoring.boxes import Transfer, cut
from aiockpt.restoring.checkpoint_view import CheckpointView
from aiockpt.restoring.destinations import Bounce, Destination, destination_for
from aiockpt.restoring.regions import region_of
from aiockpt.restoring.sources import Sources
from aiockpt.storage.readers import OPEN_AT_ONCE, AlignedBuffer, OpenCheckpoint

__all__ = ["READ_THREADS", "Reading", "never"]

READ_THREADS = 4
"""Reads in flight."""


def never() -> bool:
    """Tell that nobody asks for the end of a restore."""
    return False


class _Wanted(NamedTuple):
    """Bytes of a file that go to one tensor."""

    start: int
    """In the file: where the block of the tensor that stands there begins."""
    part: Transfer
    destination: Destination
    is_live: bool


class _Piece(NamedTuple):
    """Bytes of one block that go to one tensor."""

    destination: Destination
    part: Transfer
    """From the block into the tensor."""


class _Block(NamedTuple):
    file: int
    number: int
    pieces: list[_Piece]
    is_live: bool
    """Whether a piece goes to memory that the program sees."""


class Reading:
    """One pass over the blocks of a checkpoint that hold what is wanted.

    Args:
        checkpoint: Open for as long as this object is used.
        view: Of the same checkpoint.
        live: (entry, tensor): memory that the program sees.
        fresh: (entry, tensor): memory that nobody sees yet.

    Raises:
        CheckpointCorruptError: A header is not the one that was written, or contradicts the manifest.
        StorageError: A header cannot be read.
    """

    def __init__(
        self,
        checkpoint: OpenCheckpoint,
        view: CheckpointView,
        live: Iterable[tuple[int, torch.Tensor]],
        fresh: Iterable[tuple[int, torch.Tensor]],
    ) -> None:
        self._checkpoint = checkpoint
        self.live_changed = False
        """Whether a byte of live memory may have been overwritten."""
        self.nbytes = 0
        """Bytes of the blocks that are to be read."""
        self._device: torch.device | None = None
        wanted: dict[int, list[_Wanted]] = {}
        sources = Sources(checkpoint, view)
        for is_live, reads in ((True, live), (False, fresh)):
            for entry, tensor in reads:
                region = region_of(tensor)
                if not region.memory.numel():
                    continue
                if self._device is None and region.memory.is_cuda:
                    self._device = region.memory.device
                destination = destination_for(region.memory)
                for file, start, part in sources.reads(entry, region):
                    wanted.setdefault(file, []).append(_Wanted(start, part, destination, is_live))
        self._blocks = [block for file in sorted(wanted) for block in self._cut(file, wanted[file])]

    def run(self, *, threads: int = READ_THREADS, should_stop: Callable[[], bool] = never) -> None:
        """Read, verify and copy everything.

        Args:
            threads: That read at once.
            should_stop: Asked before each block, from any thread.

        Raises:
            CheckpointCorruptError: The first bad block in file order, of those that were seen; other blocks may have
                been copied.
            StorageError: A block cannot be read.
            RestoreError: ``should_stop`` said so.
        """
        crew = _Crew(self, self._blocks, should_stop)
        count = min(threads, len(self._blocks))
        if not count:
            return
        try:
            with ThreadPoolExecutor(count, thread_name_prefix="aiockpt-restore") as pool:
                try:
                    for future in [pool.submit(crew.work, device=self._device) for _ in range(count)]:
                        future.result()
                finally:
                    crew.stopped = True  # an interrupt of this thread must not wait for all blocks
        finally:
            self.live_changed = crew.live_changed
        if crew.failures:
            raise crew.failures[min(crew.failures)]
        if crew.asked_to_stop:
            raise RestoreError("the restore was cancelled", why="its caller asked for it", next="restore again")

    def close_file(self, file: int) -> None:
        """Close a file that no thread reads any more."""
        self._checkpoint.close_file(file, keep_header=True)

    def read_block(self, block: _Block, buffer: AlignedBuffer) -> AlignedBuffer:
        """Read and verify one block; returns the buffer that has it, another one where the given was too small."""
        reader = self._checkpoint.file(block.file)
        start, stop = reader.block_range(block.number)
        if buffer.nbytes < stop - start:
            buffer = AlignedBuffer(stop - start)
        reader.read_block(block.number, buffer)
        return buffer

    def _cut(self, file: int, reads: list[_Wanted]) -> list[_Block]:
        header = self._checkpoint.header(file)
        size = header.block_nbytes
        pieces: dict[int, list[_Piece]] = {}
        live: set[int] = set()
        for start, part, destination, is_live in sorted(reads, key=lambda read: read.start + read.part.source):
            first = (start + part.source - header.data_start) // size
            last = (start + part.stop - 1 - header.data_start) // size
            for index in range(first, last + 1):
                block_start = header.data_start + index * size - start
                found = [
                    _Piece(destination, Transfer(piece[0] - block_start, *piece[1:]))
                    for piece in cut(part, block_start, block_start + size)
                ]
                if found:
                    pieces.setdefault(index, []).extend(found)
                    if is_live:
                        live.add(index)
        data_nbytes = self._checkpoint.manifest.files[file].nbytes - header.data_start
        self.nbytes += sum(min(size, data_nbytes - index * size) for index in pieces)
        return [_Block(file, index, pieces[index], index in live) for index in sorted(pieces)]


class _Crew:
    """What the reading threads share."""

    def __init__(self, reading: Reading, blocks: list[_Block], should_stop: Callable[[], bool]) -> None:
        self.failures: dict[tuple[int, int], BaseException] = {}
        self.stopped = False
        self.asked_to_stop = False
        self.live_changed = False
        self._reading = reading
        self._blocks = iter(blocks)
        self._should_stop = should_stop
        self._lock = threading.Lock()
        self._left = Counter(block.file for block in blocks)

    def work(self, *, device: torch.device | None) -> None:
        """Take blocks until there are none."""
        buffer = AlignedBuffer(0)
        bounce: Bounce | None = None
        try:
            while (block := self._next()) is not None:
                try:
                    if bounce is not None:
                        bounce.wait()
                    old = buffer
                    buffer = self._reading.read_block(block, buffer)
                    if bounce is None or buffer is not old:
                        bounce = _renewed(bounce, buffer, device)
                    self.live_changed = self.live_changed or block.is_live
                    for destination, part in block.pieces:
                        destination.write(part, bounce)
                except BaseException as exc:  # noqa: BLE001  # raised by run(), in the thread that waits
                    with self._lock:
                        self.failures[block.file, block.number] = exc
                self._done(block)
        finally:
            if bounce is not None:
                bounce.close()

    def _done(self, block: _Block) -> None:
        """Close a file behind its last block, where there are many."""
        if len(self._left) <= OPEN_AT_ONCE:
            return
        with self._lock:
            self._left[block.file] -= 1
            is_last = not self._left[block.file]
        if is_last:
            self._reading.close_file(block.file)

    def _next(self) -> _Block | None:
        with self._lock:
            if self.stopped or self.failures:
                return None
            if self._should_stop():
                self.stopped = self.asked_to_stop = True
                return None
            return next(self._blocks, None)


def _renewed(bounce: Bounce | None, buffer: AlignedBuffer, device: torch.device | None) -> Bounce:
    if bounce is not None:
        bounce.close()
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer.view))
    return Bounce(address, buffer.nbytes, device=device)
