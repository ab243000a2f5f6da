"""Copying CUDA tensors into the pinned arena, on a side stream of each device.

The calling thread only enqueues. Behind every 64 MiB of copies a progress word is copied into pinned memory, in the
same stream; the copy thread reads that word and makes no CUDA call, so it cannot break a graph capture of the user's.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

from aiockpt.staging.arena import ArenaView
from aiockpt.staging.canaries import Canaries, take
from aiockpt.staging.layout import Layout, plain
from aiockpt.staging.pending import Lazy

__all__ = ["DeviceCopies", "DeviceSide", "Item"]

CHUNK_NBYTES = 64 << 20
"""Bytes between two progress words: about 1.2 ms of a PCIe 5 copy, long against the word's own cost (2 us)."""
JOINED_NBYTES = 4 << 20
"""Smaller tensors are joined on the device: between two copies the copy engine pauses for 1 to 2 us, which is what it
takes for 50 to 100 KB, and the enqueueing of each holds the caller for about 5 us."""
RUN_NBYTES = 32 << 20
"""Most bytes that are joined at once: what a save takes of the device's memory."""
_MAX_CHUNKS = 16_384  # 1 TiB, more than a device has
_WORD_NBYTES = 64  # the progress word, on a cache line of its own
_ALIGNMENT = 16


class Item(NamedTuple):
    """One tensor to be copied."""

    position: int
    tensor: torch.Tensor
    lazy: Lazy | None


class DeviceSide:
    """What a Stager keeps for one device: the side stream, the progress word, and the numbers copied into it.

    The memory for word and canaries is not of torch's pinned allocator: that asks CUDA for an event when a tensor is
    dropped, in whatever thread does so, and ends a forked child in which one is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Of high priority: joining small tensors takes microseconds of the device, and the next step may wait for it.
        self.stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]  # torch has no annotation
        with torch.cuda.stream(self.stream):
            self._numbers = torch.arange(_MAX_CHUNKS + 1, dtype=torch.int64, device=device)
        self._make_scratch(1 << 16)

    def _make_scratch(self, nbytes: int) -> None:
        fd = os.memfd_create("aiockpt-canaries")
        os.ftruncate(fd, nbytes)
        self._scratch = ArenaView(fd, nbytes)
        self._scratch.register_cuda(self.device)
        self._word = self._scratch.typed(0, torch.int64, (1,))
        # Read by address: no torch call, and never a value that a compiler kept in a register.
        self._value = ctypes.c_int64.from_address(self._scratch.address)

    def reset(self) -> None:
        """Begin to count anew; only while no copy is in flight."""
        self._value.value = 0

    def finished(self) -> int:
        """Return how many chunks have arrived in the arena."""
        return self._value.value

    def tell(self, number: int) -> torch.cuda.Event:
        """Enqueue, on the current stream, that chunk ``number`` has arrived; returns the event behind that."""
        self._word.copy_(self._numbers[number : number + 1], non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no annotation here
        event.record(self.stream)
        return event

    def room_like(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return pinned memory of these dtypes and shapes, until the next call; only while no copy is in flight."""
        offsets = [_WORD_NBYTES]
        for tensor in tensors:
            offsets.append(offsets[-1] + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT)
        if offsets[-1] > self._scratch.nbytes:
            self._scratch.close()
            self._make_scratch(1 << (offsets[-1] - 1).bit_length())
        return [
            self._scratch.typed(offset, tensor.dtype, tensor.shape)
            for offset, tensor in zip(offsets, tensors, strict=False)
        ]

    def close(self) -> None:
        """Give the pinned memory back; only while no copy is in flight."""
        self._scratch.close()

    def forget_in_child(self) -> None:
        """In a forked child: close the inherited descriptor."""
        self._scratch.forget_in_child()


class DeviceCopies:
    """What one save copies from one device.

    Args:
        side: Of the device; nothing of an earlier save may be in flight on it.
        layout: Of the save.
    """

    def __init__(self, side: DeviceSide, layout: Layout) -> None:
        self.side = side
        self._layout = layout
        self._chunks: list[list[Item]] = []
        self._told = 0
        self._kept: list[torch.Tensor] = []
        side.reset()

    def take_canaries(self, lazies: Sequence[Lazy]) -> Canaries:
        """Enqueue the reading of the canaries on the caller's current stream, before any later write of its own.

        The values arrive in pinned memory before the last chunk does. Comes before anything else of this save.
        """
        views = []
        for lazy in lazies:
            assert lazy.tensor is not None
            comb = self._layout.comb(lazy.position, lazy.tensor)
            views.append(plain(lazy.tensor).as_strided(*comb))
        with torch.cuda.device(self.side.device):
            on_device = take(views)
        # Made on another stream than the one that copies them: their memory may go only after that.
        self._kept += on_device.values
        on_host = self.side.room_like(on_device.values)
        self._wait_for_caller()
        with torch.cuda.stream(self.side.stream):
            for kept, values in zip(on_host, on_device.values, strict=True):
                kept.copy_(values, non_blocking=True)
        return on_device.kept_in(on_host)

    def enqueue_now(self, items: Sequence[Item]) -> None:
        """Copy, and let the caller's current stream go on only behind the copies; the calling thread does not wait."""
        for event, _ in self._enqueue(items)[-1:]:
            torch.cuda.current_stream(self.side.device).wait_event(event)

    def enqueue_later(self, items: Sequence[Item]) -> list[tuple[torch.cuda.Event, list[Item]]]:
        """Copy behind the caller's current stream, which does not wait; returns the event behind each chunk."""
        return self._enqueue(items)

    def arrived(self) -> list[Item]:
        """Return the items whose bytes are in the arena since the last call; makes no CUDA call."""
        finished = self.side.finished()
        found: list[Item] = []
        while self._told < finished:
            found += self._chunks[self._told]
            self._chunks[self._told] = []
            self._told += 1
        if self.complete:
            self._kept.clear()
        return found

    @property
    def complete(self) -> bool:
        """Whether everything has arrived."""
        return self._told == len(self._chunks)

    def _wait_for_caller(self) -> None:
        self.side.stream.wait_stream(torch.cuda.current_stream(self.side.device))

    def _enqueue(self, items: Sequence[Item]) -> list[tuple[torch.cuda.Event, list[Item]]]:
        ended: list[tuple[torch.cuda.Event, list[Item]]] = []
        chunk: list[Item] = []
        run: list[Item] = []
        nbytes = 0
        self._wait_for_caller()
        with torch.cuda.stream(self.side.stream):
            try:
                for item in items:
                    chunk.append(item)
                    nbytes += item.tensor.nbytes
                    self._add(item, run)
                    if nbytes >= CHUNK_NBYTES:
                        self._copy_run(run)
                        ended.append((self._end_chunk(chunk), chunk))
                        chunk, nbytes = [], 0
                self._copy_run(run)
            finally:  # what was enqueued must be waited for, also where the rest could not be
                if chunk:
                    ended.append((self._end_chunk(chunk), chunk))
        return ended

    def _add(self, item: Item, run: list[Item]) -> None:
        """Copy a large tensor, or put a small one to the ``run`` of its neighbours."""
        if item.tensor.nbytes >= JOINED_NBYTES:
            self._copy_run(run)
            self._copy(item)
            return
        if run and not self._adjoins(run, item):
            self._copy_run(run)
        run.append(item)

    def _copy(self, item: Item) -> None:
        self._layout.destination(item.position, item.tensor).copy_(plain(item.tensor), non_blocking=True)

    def _adjoins(self, run: list[Item], item: Item) -> bool:
        offsets, sizes, order = self._layout.plan.offsets, self._layout.plan.sizes, self._layout.order
        first, last, part = order[run[0].position], order[run[-1].position], order[item.position]
        return (
            run[-1].tensor.dtype == item.tensor.dtype
            and offsets[last] + sizes[last] == offsets[part]
            and offsets[part] + sizes[part] - offsets[first] <= RUN_NBYTES
        )

    def _copy_run(self, run: list[Item]) -> None:
        """Copy small tensors that lie side by side in the file: joined on the device, then one copy to the host."""
        if len(run) == 1:
            self._copy(run[0])
        elif run:
            try:
                # Made and dropped on the side stream: the caching allocator gives it out again to this stream only.
                joined = torch.cat([plain(item.tensor).reshape(-1) for item in run])
            except torch.OutOfMemoryError:  # one by one they need no memory of the device
                for item in run:
                    self._copy(item)
            else:
                offset = self._layout.plan.offsets[self._layout.order[run[0].position]]
                self._layout.arena.typed(offset, joined.dtype, joined.shape).copy_(joined, non_blocking=True)
        run.clear()

    def _end_chunk(self, chunk: list[Item]) -> torch.cuda.Event:
        self._chunks.append(chunk)
        return self.side.tell(len(self._chunks))
