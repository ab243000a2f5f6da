"""Keeps one worker alive: starts it, watches it, replaces it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

import anyio

from aiockpt import __version__
from aiockpt.config import Options
from aiockpt.coordinator.process import WorkerProcess
from aiockpt.coordinator.restarts import RestartBudget
from aiockpt.coordinator.spans import NO_SPAN, OpenSpan, Spans
from aiockpt.errors import (
    CheckpointError,
    ConfigError,
    ProtocolError,
    RestartLimitError,
    StorageError,
    WorkerExitedError,
    WorkerStartError,
)
from aiockpt.process_ends import describe_exit
from aiockpt.protocol.frames import check_hello
from aiockpt.protocol.messages import (
    MAGIC,
    PROTOCOL_VERSION,
    Beat,
    Close,
    Closed,
    Hello,
    Message,
    Ready,
    Setup,
)
from aiockpt.worker.launch import PACKAGE_PATH
from aiockpt.worker.link import Link

__all__ = ["Supervisor", "Tenant"]

_log = logging.getLogger("aiockpt.supervisor")

DRAIN_SECONDS = 2.0
"""For the last frames and lines of a dead worker: they lie in the kernel already, and end-of-file follows them unless a
forked child holds the other end."""
LEAVE_SECONDS = 2.0
"""For the last frames to reach the kernel."""
REAP_SECONDS = 5.0
"""For SIGKILL to work on a process that is not stuck in the kernel."""


class Tenant(Protocol):
    """Whose worker it is. Every call comes from the supervisor's task."""

    def setup(self) -> Setup:
        """What a new worker is told."""

    def worker_up(self, link: Link) -> None:
        """A worker is ready; ``link`` is good until ``worker_down``."""

    def worker_says(self, message: Message, fds: list[int]) -> None:
        """A message that is not about the worker itself; the descriptors become the tenant's."""

    async def worker_down(self, error: CheckpointError) -> None:
        """The worker is gone and reaped; settle what it had in hand before another one starts."""

    def supervision_over(self, error: CheckpointError) -> None:
        """There will be no other worker."""


class Supervisor:
    """Runs generation after generation of the worker until told to close, or until the policy is used up."""

    def __init__(self, options: Options, tenant: Tenant, spans: Spans) -> None:
        self._options = options
        self._tenant = tenant
        self._spans = spans
        self._starting = NO_SPAN
        self._budget = RestartBudget(options.restart)
        self._worker: WorkerProcess | None = None
        self._current: Link | None = None
        self._link: Link | None = None
        """The current one, once its worker is ready."""
        self._closing = False
        self._is_left = False
        self._is_running = False
        self._was_up = False
        self._ended = anyio.Event()
        self.private_nbytes: int | None = None
        """The worker's own memory, looked at once a second."""
        self.faults: tuple[str, str] | None = None
        """For tests: (``module:function``, text) that makes the worker's fault layer."""

    @property
    def pid(self) -> int | None:
        """Process id of the worker, where one runs."""
        return self._worker.pid if self._worker else None

    @property
    def restarts(self) -> int:
        """How many workers were started again."""
        return self._budget.total

    async def run(self, opening: OpenSpan) -> None:
        """Supervise; returns after ``close``, or when supervision is over.

        Args:
            opening: What the first start is a part of, for the observer.
        """
        self._is_running = True
        self._starting = opening.begin("worker_start", restart=0)
        try:
            while True:
                with self._starting:  # completed when the worker is ready
                    error = await self._run_generation()
                    if error is not None:
                        self._starting.fail(error)
                if error is None or self._closing:
                    return
                if not self._was_up:
                    self._tenant.supervision_over(error)  # what fails at once fails again
                    return
                await self._tenant.worker_down(error)
                if self._closing:
                    return
                try:
                    delay = self._budget.spend(time.monotonic())
                except RestartLimitError as limit:
                    limit.why += f"; the last one: {error}"
                    self._tenant.supervision_over(limit)
                    return
                _log.warning("the checkpoint worker is started again in %.1f s\nwhy: %s", delay, error)
                await anyio.sleep(delay)
                if self._closing:
                    return
                self._starting = self._spans.begin("worker_start", restart=self.restarts, reason=error.what)
        finally:
            self._ended.set()

    async def close(self, timeout: float) -> None:
        """Ask the worker to finish and end; kill it after ``timeout`` seconds. Returns when it is reaped."""
        self._closing = True
        if not self._is_running:
            return
        if self._link is not None:
            self._link.send(Close())
        elif self._worker is not None:
            self._worker.kill()
        with anyio.move_on_after(timeout, shield=True):
            await self._ended.wait()
            return
        if self._worker is not None:
            _log.warning("worker %d did not end in %.1f s and is killed", self._worker.pid, timeout)
            self._worker.kill()
        with anyio.move_on_after(2 * REAP_SECONDS, shield=True):
            await self._ended.wait()

    async def leave(self) -> None:
        """Tell the worker to finish and end, and do not wait for that: the program is in a hurry."""
        self._closing = self._is_left = True
        if self._link is not None:
            self._link.send(Close())
            with anyio.move_on_after(LEAVE_SECONDS, shield=True):
                await self._link.wait_idle()  # the end of staging may still wait to be sent

    def forget_in_child(self) -> None:
        """In a forked child: close what was inherited of the worker."""
        if self._worker is not None:
            self._worker.close()
        if self._current is not None:
            self._current.forget_in_child()

    async def _run_generation(self) -> CheckpointError | None:
        """Start one worker and stay with it; return why it is gone, None where it closed as told."""
        try:
            worker = await anyio.to_thread.run_sync(WorkerProcess.spawn, self.faults)
        except WorkerStartError as exc:
            return exc
        link = await Link.wrap(worker.socket.detach())
        self._worker = worker
        self._current = link
        generation = _Generation(self, worker, link)
        try:
            error = await generation.live()
        finally:
            self._link = None
            is_gone = False
            with anyio.CancelScope(shield=True):
                if self._is_left:
                    worker.reap_later()
                else:
                    worker.kill()
                    is_gone = await worker.reap(REAP_SECONDS)
                await link.aclose()
            self._worker = self._current = self.private_nbytes = None
            worker.close()
        if generation.said_closed and self._closing:
            return None
        return generation.explain(error, is_gone)


class _Generation:
    """One worker from its start to its end. The first verdict ends it."""

    def __init__(self, owner: Supervisor, worker: WorkerProcess, link: Link) -> None:
        self._owner = owner
        self._tenant = owner._tenant
        self._options = owner._options
        self._worker = worker
        self._link = link
        self._verdict: CheckpointError | None = None
        self._end: Callable[[], None] = lambda: None
        self._is_ready = False
        self._reader_done = anyio.Event()
        self._stderr_done = anyio.Event()
        self._heard = 0
        self._moved = -1
        self._busy = ""
        self.said_closed = False

    async def live(self) -> CheckpointError | None:
        """Serve until a verdict; None where the worker just ended."""
        self._link.send(
            Hello(
                magic=MAGIC,
                protocol=PROTOCOL_VERSION,
                package=__version__,
                path=PACKAGE_PATH,
                setup=self._tenant.setup(),
            )
        )
        async with anyio.create_task_group() as tasks:
            self._end = tasks.cancel_scope.cancel
            for task in (self._pump, self._link.run_sender, self._read, self._watch_death, self._watch_silence):
                tasks.start_soon(task)
        return self._verdict

    def _decide(self, error: CheckpointError | None) -> None:
        if self._verdict is None:
            self._verdict = error
        self._end()

    def explain(self, verdict: CheckpointError | None, is_gone: bool) -> CheckpointError:
        """Return the error of a worker that is gone, with its exit status and last lines."""
        if verdict is not None and not isinstance(verdict, WorkerStartError):
            return verdict
        tail = "\n".join(self._worker.tail)
        status = self._worker.exit_status
        why = verdict.why if verdict is not None else describe_exit(status)
        if tail:
            why += f"; its last lines:\n{tail}"
        kind = WorkerExitedError if self._is_ready else WorkerStartError
        what = "died" if self._is_ready else "did not come up"
        return kind(
            f"the checkpoint worker (pid {self._worker.pid}) {what}",
            why=why,
            next="see its lines in the log" if is_gone else "it is stuck in the kernel: look at the disk",
            exit_status=status,
            stderr=tail,
        )

    async def _pump(self) -> None:
        await self._worker.pump_stderr()
        self._stderr_done.set()

    async def _read(self) -> None:
        greeted = False
        try:
            async for message, fds in self._link.receive():
                self._heard += 1
                if not greeted:
                    check_hello(message, package=__version__, path=PACKAGE_PATH)
                    greeted = True
                    continue
                self._handle(message, fds)
        except ProtocolError as exc:
            self._decide(exc)
        self._reader_done.set()

    def _handle(self, message: Message, fds: list[int]) -> None:
        match message:
            case Ready(error=None):
                self._is_ready = self._owner._was_up = True
                self._owner._link = self._link
                self._owner._starting.complete(pid=self._worker.pid)
                self._owner.private_nbytes = self._worker.private_nbytes()
                if self._owner._closing:
                    self._link.send(Close())
                self._tenant.worker_up(self._link)
            case Ready(error=error) if error is not None:
                self._decide(_start_error(error.kind, error.what, error.why, error.next, error.errno, error.path))
            case Beat(moved=moved, busy=busy):
                self._moved, self._busy = moved, busy
            case Closed():
                self.said_closed = True
            case _:
                self._tenant.worker_says(message, fds)

    async def _watch_death(self) -> None:
        await self._worker.wait_dead()
        # Its last frames and lines are still to be read; a child that was forked at a bad moment may hold the
        # other end open, so end-of-file alone may never come.
        with anyio.move_on_after(DRAIN_SECONDS):
            await self._reader_done.wait()
            await self._stderr_done.wait()
        self._decide(None)

    async def _watch_silence(self) -> None:
        """Count silence in ticks of this loop, each at most one period long.

        A trainer that was itself stopped wakes up with one tick on the clock, so it kills nobody.
        """
        options = self._options
        limits = (options.start_timeout, options.stall_timeout, options.io_timeout)
        period = min(1.0, *(limit / 8 for limit in limits if limit is not None), 1.0)
        waited = silent = stuck = 0.0
        heard = moved = -1
        while True:
            await anyio.sleep(period)
            await anyio.lowlevel.checkpoint()  # frames that wait in the socket are read before the verdict
            waited += period
            silent = 0.0 if heard != self._heard else silent + period
            stuck = 0.0 if moved != self._moved or not self._busy else stuck + period
            heard, moved = self._heard, self._moved
            self._owner.private_nbytes = self._worker.private_nbytes()
            if not self._is_ready and _over(waited, self._options.start_timeout):
                self._decide(WorkerStartError("", why=f"it was not ready within {self._options.start_timeout:g} s"))
            elif self._is_ready and _over(silent, self._options.stall_timeout):
                self._decide(self._stalled(f"it gave no sign of life for {self._options.stall_timeout:g} s"))
            elif self._is_ready and _over(stuck, self._options.io_timeout):
                self._decide(self._stalled(f"{self._busy!r} made no progress for {self._options.io_timeout:g} s"))

    def _stalled(self, why: str) -> WorkerExitedError:
        return WorkerExitedError(
            f"the checkpoint worker (pid {self._worker.pid}) stalled and was killed",
            why=why,
            next="look at the disk; raise stall_timeout or io_timeout if this is normal here",
        )


def _over(seconds: float, limit: float | None) -> bool:
    return limit is not None and seconds >= limit


def _start_error(kind: str, what: str, why: str, next: str, errno: int | None, path: str | None) -> CheckpointError:
    if kind == "config":
        return ConfigError(what, why=why, next=next, argument="run", path=path)
    return StorageError(what, why=why, next=next, errno=errno, path=path)
