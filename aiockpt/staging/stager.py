"""The Stager decides, for every tensor of a save, when it is copied: before ``stage`` returns, or behind it."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from aiockpt.config import Snapshot
from aiockpt.errors import StorageError, UsageError
from aiockpt.format.image import BLOCK_NBYTES
from aiockpt.format.names import Segments
from aiockpt.planning.local import LocalPlan
from aiockpt.staging import guard
from aiockpt.staging.arena import ArenaView
from aiockpt.staging.canaries import CANARY_NBYTES, take
from aiockpt.staging.copy_cpu import PIECE_NBYTES, units
from aiockpt.staging.copy_cuda import DeviceCopies, DeviceSide, Item
from aiockpt.staging.copy_shared import SharedCopy
from aiockpt.staging.copy_thread import CopyThread
from aiockpt.staging.layout import Layout, plain
from aiockpt.staging.ownership import Ownership
from aiockpt.staging.pending import Lazy, uncounted
from aiockpt.staging.progress import Progress
from aiockpt.staging.snapshot import Staging

if TYPE_CHECKING:
    from aiockpt.state.collect import Collected

__all__ = ["Stager", "Thresholds"]

_log = logging.getLogger("aiockpt.staging")

_CLOSE_SECONDS = 5.0
"""For the copy thread to end: it is told to, and looks after every piece of 16 MiB."""
_HELPED_NBYTES = 16 << 20
"""From here on the copy thread helps with what is copied at once: below, waking it takes longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Sizes, in bytes, by which the Stager decides."""

    lazy_nbytes: int = 64 << 10
    """A smaller tensor is copied at once: that costs less than watching it."""
    lazy_total_nbytes: int = 1 << 20
    """CPU tensors that are together at most this large are copied at once: 0.1 ms."""
    piece_nbytes: int = PIECE_NBYTES
    """Copied between two looks at progress and cancel."""
    canary_nbytes: int = CANARY_NBYTES
    """Distance between two canaries."""
    block_nbytes: int = BLOCK_NBYTES
    """Progress is told where a further block of a file is complete."""


_DEFAULTS = Thresholds()


@dataclass(slots=True)
class _Sorted:
    """The tensors of one save by when they are copied, each list in file order."""

    now: list[int]
    now_tensors: list[torch.Tensor]
    later: list[Lazy]


class Stager:
    """Copies snapshots of one Checkpointer into its arena, one at a time.

    Args:
        snapshot: ``guarded`` copies what optimizers own behind the caller's back; ``inline`` copies all at once.
        stall_timeout: Seconds that an optimizer's step waits for a pending copy that makes no progress; None is no
            limit. On expiry the save fails and training steps on.
        on_guard_wait: Called in the thread that steps an optimizer, with the seconds that it waited for CPU copies.
        thresholds: For tests with small tensors.

    Thread-safety: ``stage`` from one thread at a time; the rest from any.
    """

    def __init__(
        self,
        *,
        snapshot: Snapshot,
        stall_timeout: float | None,
        on_guard_wait: Callable[[float], None] = uncounted,
        thresholds: Thresholds = _DEFAULTS,
    ) -> None:
        self._guarded = snapshot == "guarded"
        self._stall_timeout = stall_timeout
        self._on_guard_wait = on_guard_wait
        self._thresholds = thresholds
        self._thread = CopyThread()
        self._layout: Layout | None = None
        self._turn: int | None = None
        self._torn: set[Segments] = set()
        self._sides: dict[torch.device, DeviceSide] = {}
        self._last: Staging | None = None
        self._pid = os.getpid()
        self._closed = False
        guard.install()  # what is captured from now on in a CUDA graph is seen; the first save would be too late

    def prepare(self, plan: LocalPlan, collected: Collected, arena: ArenaView) -> None:
        """Make once what every save of this plan into this arena needs, so that the first one does not pay for it.

        Raises:
            ConfigError: A CUDA graph is being captured.
            UsageError: As ``stage``.
        """
        self._refuse_misuse()
        layout = self._layout_of(plan, arena)
        guard.install()
        self._thread.start()
        for position, tensor in enumerate(layout.blocks(collected.tensors)):
            layout.destination(position, tensor)
            if tensor.is_cuda:
                self._side_of(tensor.device, arena)

    def _side_of(self, device: torch.device, arena: ArenaView) -> DeviceSide:
        arena.register_cuda(device)
        side = self._sides.get(device)
        if side is None:
            side = self._sides[device] = DeviceSide(device)
        return side

    def stage(
        self,
        plan: LocalPlan,
        collected: Collected,
        arena: ArenaView,
        *,
        write_texts: bool,
        step: int,
        on_begin: Callable[[], None],
        on_progress: Callable[[int, int], None],
        on_done: Callable[[BaseException | None], None],
    ) -> Staging:
        """Copy what must be copied at once, guard the rest, return when training may go on.

        Args:
            plan: Of ``collected``.
            collected: The live tensors; nothing of them is kept beyond their copying.
            arena: At least ``plan.arena_nbytes`` long, free of earlier saves.
            write_texts: Write headers, plain files and the plan's body too; not needed where the same plan was
                staged into the same arena before.
            step: For messages.
            on_begin: Called once in the calling thread, before all other calls: ahead of a long copy, so that the
                worker makes its files meanwhile, else last, so that no other thread wakes up during a short one.
            on_progress: Called with a file's index and how many of its first bytes are final (its header's checksums
                aside); grows for each file, at each 16 MiB block and at the file's end. On the copy thread.
            on_done: Called once when nothing touches the arena any more: with None after all checks, else with a
                TornSnapshotError, SaveCancelledError, SaveTimeoutError or what went wrong. On the copy thread, maybe
                before this returns.

        Raises:
            ConfigError: A CUDA graph is being captured.
            UsageError: After ``close``, in a forked child, or while the last snapshot is still being copied.
            StorageError: ENOMEM: a CUDA device has no memory left to make a strided tensor contiguous.

        Where this raises, ``on_done`` is not called.
        """
        began = time.perf_counter()
        self._refuse_misuse()
        if arena.nbytes < plan.arena_nbytes:
            raise ValueError(f"the plan needs {plan.arena_nbytes} bytes, the arena has {arena.nbytes}")
        layout = self._layout_of(plan, arena)
        guard.install()
        # In the first save nothing is owned: no hook has fired for this Stager.
        seen = guard.fired_since(self._turn) if self._guarded and self._turn is not None else []
        ownership = Ownership(seen, self._thresholds.lazy_nbytes)
        staging = Staging(
            layout,
            collected.entries,
            step=step,
            stall_timeout=self._stall_timeout,
            owners=ownership.owners,
            torn_keys=self._torn,
            piece_nbytes=self._thresholds.piece_nbytes,
            on_progress=on_progress,
            on_done=on_done,
            on_guard_wait=self._on_guard_wait,
            wake=self._thread.post,
        )
        progress = Progress(
            layout,
            staging.report,
            block_nbytes=self._thresholds.block_nbytes,
        )
        self._last = staging  # also where this raises: what is in flight must end before the next one
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._copy(layout, collected, ownership, staging, progress, on_begin, write_texts=write_texts)
        except BaseException as exc:
            staging.abandon(exc)
            self._thread.post(partial(staging.run, progress))
            if isinstance(exc, torch.OutOfMemoryError):
                raise _out_of_memory(step, exc) from exc
            raise
        staging.inline_s = time.perf_counter() - began
        self._thread.post(partial(staging.run, progress))
        return staging

    def sync_pending(self) -> None:
        """Return when no live tensor is still to be copied, so that a restore may overwrite them.

        Where the copies make no progress for ``stall_timeout``, their save fails instead.
        """
        if self._last is not None:
            self._last.wait_copied()

    def close(self) -> None:
        """Cancel what is still being copied and end the thread; idempotent."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        if self._last is not None:
            self._last.cancel()
        if not self._thread.close(_CLOSE_SECONDS):
            _log.warning("the copy thread did not end within %s s; it ends with the process", _CLOSE_SECONDS)
        elif self._last is None or self._last.let_devices_go():  # else a device may still write there
            for side in self._sides.values():
                side.close()
        self._layout = None

    def forget_in_child(self) -> None:
        """In a forked child: neither thread nor copies are here; every later call is refused."""
        self._thread.forget_in_child()
        guard.forget_in_child()
        for side in self._sides.values():
            side.forget_in_child()
        if self._last is not None and not self._last.done:
            # Never freed here: the destructor of a CUDA event, which it holds, would end a forked child.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._last))
        self._last = self._layout = None

    def _refuse_misuse(self) -> None:
        if os.getpid() != self._pid:
            raise UsageError(
                "no snapshot is taken in a forked child",
                why="the copy thread and the arena belong to the parent",
                next="open a Checkpointer of the child's own",
            )
        if self._closed:
            raise UsageError("no snapshot is taken after close", next="open the Checkpointer again")
        guard.refuse_capture("save()")
        last = self._last
        if last is not None:
            # It answers a moment before it is over. A device that never answered may still write into the arena.
            last.over.wait(self._stall_timeout)
            if not last.done or not last.let_devices_go():
                raise UsageError(
                    f"the snapshot of step {last.step} is still being copied", next="wait for it, or open anew"
                )

    def _layout_of(self, plan: LocalPlan, arena: ArenaView) -> Layout:
        layout = self._layout
        if layout is None or layout.plan is not plan or layout.arena is not arena:
            layout = self._layout = Layout(plan, arena, canary_nbytes=self._thresholds.canary_nbytes)
        return layout

    def _copy(
        self,
        layout: Layout,
        collected: Collected,
        ownership: Ownership,
        staging: Staging,
        progress: Progress,
        on_begin: Callable[[], None],
        *,
        write_texts: bool,
    ) -> None:
        plan = layout.plan
        if write_texts:
            for offset, text in plan.texts:
                layout.arena.write(offset, text)
        chosen = self._sort(layout, collected, ownership)
        staging.lazy_nbytes = sum(lazy.nbytes for lazy in chosen.later)
        staging.inline_nbytes = plan.data_nbytes - staging.lazy_nbytes
        staging.much_at_once = staging.inline_nbytes >= _HELPED_NBYTES
        progress.begin()
        for lazy in chosen.later:
            staging.pending.add(lazy)
        on_host = [lazy for lazy in chosen.later if lazy.on_host]
        if on_host:
            combs = []
            for lazy in on_host:
                assert lazy.tensor is not None
                combs.append(plain(lazy.tensor).as_strided(*layout.comb(lazy.position, lazy.tensor)))
            staging.canaries.append((take(combs), on_host))
        self._copy_devices(layout, chosen, staging)
        self._turn = guard.begin(staging.pending if chosen.later else None)
        if staging.much_at_once:
            on_begin()
        self._copy_inline(layout, chosen, staging, progress)
        if not staging.much_at_once:
            on_begin()

    def _sort(self, layout: Layout, collected: Collected, ownership: Ownership) -> _Sorted:
        """Decide by line 1 (at once, where in doubt) and line 2 (the guard)."""
        tensors = layout.blocks(collected.tensors)
        if [tensor.nbytes for tensor in tensors] != layout.sizes:
            raise ValueError("the tensors are not those of the plan")
        later = self._guarded_lazies(layout, collected, ownership, tensors) if ownership else []
        on_host = sum(lazy.nbytes for lazy in later if lazy.on_host)
        if on_host <= self._thresholds.lazy_total_nbytes:
            later = [lazy for lazy in later if not lazy.on_host]
        taken = bytearray(layout.empty)
        for lazy in later:
            taken[lazy.position] = 1
        now = [position for position, is_taken in enumerate(taken) if not is_taken]
        return _Sorted(now, [tensors[position] for position in now], later)

    def _guarded_lazies(
        self, layout: Layout, collected: Collected, ownership: Ownership, tensors: list[torch.Tensor]
    ) -> list[Lazy]:
        found: list[Lazy] = []
        at_least, torn, entries, order = self._thresholds.lazy_nbytes, self._torn, collected.entries, layout.order
        for position, nbytes in enumerate(layout.sizes):
            if nbytes < at_least or (torn and entries[layout.entries[position]].segments in torn):
                continue
            tensor = tensors[position]
            address = tensor.data_ptr()
            span = ownership.find(address, nbytes)
            if span is None or not tensor.is_contiguous() or tensor.is_inference():
                continue
            if tensor.is_cpu or tensor.is_cuda:
                found.append(Lazy(order[position], position, tensor, nbytes, address, span[1], span[2]))
        return found

    def _copy_inline(self, layout: Layout, chosen: _Sorted, staging: Staging, progress: Progress) -> None:
        on_host, sources = chosen.now, chosen.now_tensors
        if not all([tensor.is_cpu for tensor in sources]):  # noqa: C419  # a list is faster than a generator
            pairs = list(zip(chosen.now, chosen.now_tensors, strict=True))
            for position, tensor in pairs:
                if not (tensor.is_cpu or tensor.is_cuda):  # no side stream of ours there, so the caller waits
                    layout.destination(position, tensor).copy_(plain(tensor))
                    progress.copied([position])
            on_host = [position for position, tensor in pairs if tensor.is_cpu]
            sources = [tensor for _, tensor in pairs if tensor.is_cpu]
        shared = SharedCopy(units(on_host, sources, layout, piece_nbytes=self._thresholds.piece_nbytes), progress)
        if staging.much_at_once:
            self._thread.post(partial(shared.help, staging.deliver))
        shared.run()

    def _copy_devices(self, layout: Layout, chosen: _Sorted, staging: Staging) -> None:
        """Enqueue all CUDA copies, per device first those that the caller's stream waits for."""
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has no annotation here
            return
        now: dict[torch.device, list[Item]] = {}
        later: dict[torch.device, list[Item]] = {}
        for position, tensor in zip(chosen.now, chosen.now_tensors, strict=True):
            if tensor.is_cuda:
                now.setdefault(tensor.device, []).append(Item(position, tensor, None))
        for lazy in chosen.later:
            if lazy.tensor is not None and not lazy.on_host:
                later.setdefault(lazy.tensor.device, []).append(Item(lazy.position, lazy.tensor, lazy))
        for device in sorted(now.keys() | later.keys(), key=str):
            copies = DeviceCopies(self._side_of(device, layout.arena), layout)
            staging.devices.append(copies)
            lazies = [item.lazy for item in later.get(device, ()) if item.lazy is not None]
            if lazies:
                staging.canaries.append((copies.take_canaries(lazies), lazies))
            copies.enqueue_now(now.get(device, []))
            for event, chunk in copies.enqueue_later(later.get(device, [])):
                staging.pending.add_event(device, event, [item.lazy for item in chunk if item.lazy is not None])


def _out_of_memory(step: int, error: torch.OutOfMemoryError) -> StorageError:
    return StorageError(
        f"step {step} not saved: a CUDA device has no memory left for copying the snapshot",
        why=str(error).splitlines()[0],
        next="tensors that are not contiguous are copied on the device first: make them contiguous, or leave it room",
        errno=errno.ENOMEM,
    )
