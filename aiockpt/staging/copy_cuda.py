"""Copying CUDA tensors into the pinned arena, on a side stream of each device.

The calling thread only enqueues. Behind every 64 MiB of copies a progress word is copied into pinned memory, in the
same stream; the copy thread reads that word and makes no CUDA call, so it cannot break a graph capture of the user's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from aiockpt.staging.canaries import Canaries, take
from aiockpt.staging.layout import Layout, plain
from aiockpt.staging.pending import Lazy

__all__ = ["DeviceCopies", "DeviceSide", "Item"]

CHUNK_NBYTES = 64 << 20
"""Bytes between two progress words: about 1.2 ms of a PCIe 5 copy, long against the word's own cost (2 us)."""
BATCH_NBYTES = 256 << 10
"""Below this a tensor is joined with its neighbours on the device: a copy of its own costs more than its bytes."""
_MAX_CHUNKS = 8192  # 512 GiB, more than a device has


class Item(NamedTuple):
    """One tensor to be copied."""

    position: int
    tensor: torch.Tensor
    lazy: Lazy | None


class DeviceSide:
    """What a Stager keeps for one device: the side stream, the progress word, and the numbers copied into it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no annotation here
        with torch.cuda.stream(self.stream):
            self.numbers = torch.arange(_MAX_CHUNKS + 1, dtype=torch.int64, device=device)
        self.word = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        # Read by address: no torch call, and never a value that a compiler kept in a register.
        self._value = ctypes.c_int64.from_address(self.word.data_ptr())

    def reset(self) -> None:
        """Begin to count anew; only while no copy is in flight."""
        self._value.value = 0

    def finished(self) -> int:
        """Return how many chunks have arrived in the arena."""
        return self._value.value


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

        The values arrive in pinned memory before the last chunk does.
        """
        views = []
        for lazy in lazies:
            assert lazy.tensor is not None
            comb = self._layout.comb(lazy.position, lazy.tensor)
            views.append(plain(lazy.tensor).as_strided(*comb))
        with torch.cuda.device(self.side.device):
            on_device = take(views)
        self._wait_for_caller()

        def to_host(values: torch.Tensor) -> torch.Tensor:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            with torch.cuda.stream(self.side.stream):
                host.copy_(values, non_blocking=True)
            self._kept.append(values)  # made on another stream: its memory may go only after the copy
            return host

        return on_device.map(to_host)

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
        if item.tensor.nbytes >= BATCH_NBYTES:
            self._copy_run(run)
            self._copy(item)
            return
        if run and not self._adjoins(run[-1], item):
            self._copy_run(run)
        run.append(item)

    def _copy(self, item: Item) -> None:
        self._layout.destination(item.position, item.tensor).copy_(plain(item.tensor), non_blocking=True)

    def _adjoins(self, last: Item, item: Item) -> bool:
        plan, order = self._layout.plan, self._layout.order
        entry = order[last.position]
        return (
            last.tensor.dtype == item.tensor.dtype
            and plan.offsets[entry] + plan.sizes[entry] == plan.offsets[order[item.position]]
        )

    def _copy_run(self, run: list[Item]) -> None:
        """Copy small tensors that lie side by side in the file: joined on the device, then one copy to the host."""
        if len(run) == 1:
            self._copy(run[0])
        elif run:
            # Made and dropped on the side stream: the caching allocator gives it out again to this stream only.
            joined = torch.cat([plain(item.tensor).reshape(-1) for item in run])
            offset = self._layout.plan.offsets[self._layout.order[run[0].position]]
            self._layout.arena.typed(offset, joined.dtype, joined.shape).copy_(joined, non_blocking=True)
        run.clear()

    def _end_chunk(self, chunk: list[Item]) -> torch.cuda.Event:
        self._chunks.append(chunk)
        number = len(self._chunks)
        self.side.word.copy_(self.side.numbers[number : number + 1], non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no annotation here
        event.record(self.side.stream)
        return event
