"""One snapshot on its way into the arena: it ends once, staged or failed."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from aiockpt.errors import SaveCancelledError, SaveTimeoutError, TornSnapshotError
from aiockpt.format.names import Segments, dotted
from aiockpt.planning.local import Entry
from aiockpt.staging import guard
from aiockpt.staging.arena import ArenaView
from aiockpt.staging.canaries import Canaries
from aiockpt.staging.copy_cpu import copy_later
from aiockpt.staging.copy_cuda import DeviceCopies
from aiockpt.staging.layout import Layout
from aiockpt.staging.pending import Lazy, Owner, PendingCopies
from aiockpt.staging.progress import Progress

__all__ = ["Staging"]

_log = logging.getLogger("aiockpt.staging")

_NAMED_KEYS = 5
"""Keys that a message lists; ``keys`` has all."""
_POLL_SECONDS = 0.001
"""Between two looks at the progress words; nothing else can tell without a CUDA call. A word comes every 1.2 ms or so,
and each look takes the interpreter's lock from training."""


def _no_progress(file: int, upto: int) -> None:
    pass


def _no_answer(error: BaseException | None) -> None:
    pass


class Staging:
    """A snapshot being copied. Made by ``Stager.stage``.

    Thread-safety: the public methods may be called from any thread.
    """

    def __init__(
        self,
        layout: Layout,
        entries: Sequence[Entry],
        *,
        step: int,
        stall_timeout: float | None,
        owners: Sequence[Owner],
        torn_keys: set[Segments],
        piece_nbytes: int,
        on_progress: Callable[[int, int], None],
        on_done: Callable[[BaseException | None], None],
        on_guard_wait: Callable[[float], None],
        wake: Callable[[Callable[[], None]], None],
    ) -> None:
        self.step = step
        self.inline_nbytes = 0
        """Bytes copied before ``stage`` returned."""
        self.much_at_once = False
        """Whether copying them takes long enough that the copy thread is to help, and to report, meanwhile."""
        self.lazy_nbytes = 0
        """Bytes copied behind the caller's back; on CUDA also those that the caller's stream waits for."""
        self.inline_s = 0.0
        """Seconds that ``stage`` held its caller."""
        self.staged_s = 0.0
        """Seconds from the call to the end of the last copy."""
        self.error: BaseException | None = None
        """Why nothing was staged; set before ``done``."""
        self.pending = PendingCopies(
            owners, stall_timeout=stall_timeout, on_failure=self._on_failure, on_wait=on_guard_wait
        )
        self.devices: list[DeviceCopies] = []
        self.canaries: list[tuple[Canaries, Sequence[Lazy]]] = []
        self._layout = layout
        self._arena: ArenaView = layout.arena
        self._entries = entries
        self._stall_timeout = stall_timeout
        self._torn_keys = torn_keys
        self._piece_nbytes = piece_nbytes
        self._on_progress = on_progress
        self._on_done = on_done
        self._wake = wake
        self._reports: deque[tuple[int, int]] = deque()
        self._running = False
        self._settling = threading.Lock()
        self._settled = False
        self._abandoned = False
        self.over = threading.Event()
        self._began = time.perf_counter()
        self._arena.hold()

    @property
    def done(self) -> bool:
        """Whether it has ended and ``on_done`` was called."""
        return self.over.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; returns whether everything is staged and checked (see ``error`` where not)."""
        return self.over.wait(timeout) and self.error is None

    def cancel(self) -> None:
        """Give the snapshot up. ``on_done`` gets a SaveCancelledError as soon as the copy thread has let go of it."""
        self.fail(
            SaveCancelledError(f"step {self.step} not saved: cancelled while it was being copied", step=self.step)
        )

    def fail(self, error: BaseException) -> None:
        """Make the end a failure, unless it has ended; the first error stays."""
        with self._settling:
            if self._settled:
                return
            if self.error is None:
                self.error = error
        self.pending.stop()

    def wait_copied(self) -> None:
        """Return when the live tensors may be written: all copies are made, or the save failed by ``stall_timeout``."""
        self.pending.wait_copied()

    def _on_failure(self, error: Exception | None) -> None:
        self.fail(
            error
            or SaveTimeoutError(
                f"step {self.step} not saved: the copy of its snapshot made no progress for {self._stall_timeout} s",
                why="optimizer.step() waited for it, gave up and went on",
                next="look for a machine that swaps or is stopped; stall_timeout= is how long a step waits",
                step=self.step,
                timeout=self._stall_timeout,
                phase="STAGING",
            )
        )

    def report(self, file: int, upto: int) -> None:
        """Take a progress from the one thread that makes it just now; the owner gets it on the copy thread.

        During ``stage`` the copy thread is woken for it only where there is ``much_at_once`` to copy: else ``run``
        comes sooner than that pays, and two threads that wake each other hand the interpreter's lock to and fro.
        """
        self._reports.append((file, upto))
        if self._running:
            self.deliver()
        elif self.much_at_once:
            self._wake(self.deliver)

    # ---- on the copy thread

    def deliver(self) -> None:
        """Hand what was reported on to the owner."""
        while self._reports:
            report = self._reports.popleft()
            if self.pending.stopped:
                continue
            try:
                self._on_progress(*report)
            except BaseException as exc:  # noqa: BLE001  # the owner's failure is this save's, never the thread's
                self.fail(exc)

    def run(self, progress: Progress) -> None:
        """Make the late copies, check them, end; on the copy thread, once."""
        self._running = True
        self.deliver()
        try:
            pending = self.pending
            on_host = [lazy for lazy in pending.lazies if lazy.on_host]
            with torch.no_grad():
                copy_later(on_host, self._layout, progress, pending, piece_nbytes=self._piece_nbytes)
            del on_host
            self._await_devices(progress)
            self.staged_s = time.perf_counter() - self._began
            if not pending.stopped:
                self._check()
        except BaseException as exc:  # noqa: BLE001  # whatever it was, the owner must hear of it
            self.fail(exc)
        self._end()

    def _await_devices(self, progress: Progress) -> None:
        # Enqueued copies cannot be taken back: even a cancelled save waits for them, or its arena would be written
        # into under the next one.
        quiet_since = time.monotonic()
        open_devices = list(self.devices)
        pause = threading.Event()
        while open_devices:
            for copies in list(open_devices):
                items = copies.arrived()
                if items:
                    quiet_since = time.monotonic()
                    self.pending.staged([item.lazy for item in items if item.lazy is not None])
                    progress.copied(sorted(item.position for item in items))
                if copies.complete:
                    open_devices.remove(copies)
            if open_devices:
                if self._stall_timeout is not None and time.monotonic() - quiet_since > self._stall_timeout:
                    raise SaveTimeoutError(
                        f"step {self.step} not saved: no bytes came from {open_devices[0].side.device} for "
                        f"{self._stall_timeout} s",
                        why="the device did not get to the copies",
                        next="look for a kernel or a collective that hangs; stall_timeout= is the limit",
                        step=self.step,
                        timeout=self._stall_timeout,
                        phase="STAGING",
                    )
                pause.wait(_POLL_SECONDS)

    def _check(self) -> None:
        guard.end(self.pending)  # all is copied: nobody has to wait for the comparison
        torn = set(self.pending.torn)
        for canaries, lazies in self.canaries:
            staged = [self._layout.staged_canaries(lazy.position) for lazy in lazies]
            torn.update(lazies[i].part for i in canaries.differing(staged))
        if torn:
            segments = sorted({self._entries[self._layout.entry_of(part)].segments for part in torn})
            self._torn_keys.update(segments)
            self.fail(self._torn_error([dotted(key) for key in segments]))

    def _torn_error(self, keys: list[str]) -> TornSnapshotError:
        some = ", ".join(keys[:_NAMED_KEYS]) + (f" and {len(keys) - _NAMED_KEYS} more" if keys[_NAMED_KEYS:] else "")
        return TornSnapshotError(
            f"step {self.step} not saved: {some} changed while being copied",
            why="something other than optimizer.step() wrote to them after save() returned "
            "(an EMA swap, clipping, load_state_dict)",
            next='call save.wait_staged() before such a write, or open with snapshot="inline"; '
            "from now on these are copied before save() returns",
            step=self.step,
            keys=tuple(keys),
        )

    def _end(self) -> None:
        self._let_go()
        with self._settling:
            self._settled = True
            abandoned = self._abandoned
        if not abandoned:
            try:
                self._on_done(self.error)
            except BaseException:  # noqa: BLE001  # the thread and the next save live on
                _log.exception("step %d: the answer to the end of staging failed", self.step)
        # Whoever is behind the callbacks has this object: without the cycle neither needs the garbage collector.
        self._on_progress, self._on_done = _no_progress, _no_answer
        self.over.set()

    def abandon(self, error: BaseException) -> None:
        """End without ``on_done``: ``stage`` itself raises ``error``. On the caller's thread, instead of ``run``."""
        self.fail(error)
        self._abandoned = True

    def _let_go(self) -> None:
        guard.end(self.pending)
        self.pending.stop()
        self.pending.release()
        self.canaries.clear()
        if all(copies.complete for copies in self.devices):
            self._let_arena_go()
        # Else a device may still write: the arena stays mapped, and the tensors alive, until it has answered.

    def _let_arena_go(self) -> None:
        self.devices.clear()
        self._arena.release()

    def let_devices_go(self) -> bool:
        """Look whether devices that had not answered at the end have done so since; once it is ``done``.

        Returns:
            Whether none is left that may write into the arena.
        """
        if self.devices:
            for copies in self.devices:
                copies.arrived()
            if all(copies.complete for copies in self.devices):
                self._let_arena_go()
        return not self.devices
