"""The coordinator of one run: opens, supervises, closes; both faces stand on it."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread

from aiockpt.config import Options
from aiockpt.coordinator import failures
from aiockpt.coordinator.arena_owner import ArenaOwner
from aiockpt.coordinator.desk import Desk
from aiockpt.coordinator.held_run import HeldRun
from aiockpt.coordinator.job import Job
from aiockpt.coordinator.loop_thread import LoopThread, wait_for
from aiockpt.coordinator.open_run import OpenRun
from aiockpt.coordinator.pacing import Pacing
from aiockpt.coordinator.process_hooks import forget, remember
from aiockpt.coordinator.rendezvous import find_group
from aiockpt.coordinator.restoring import Restoring
from aiockpt.coordinator.save_record import SaveRecord
from aiockpt.coordinator.saves import Saves
from aiockpt.coordinator.saving import Saving
from aiockpt.coordinator.schedule import Schedule, WhenToSave
from aiockpt.coordinator.spans import OpenSpan, Spans
from aiockpt.coordinator.statistics import Statistics
from aiockpt.coordinator.supervisor import Supervisor
from aiockpt.coordinator.system_needs import check_system
from aiockpt.coordinator.tally import Tally
from aiockpt.errors import CheckpointError, UsageError
from aiockpt.planning.local import LocalPlan
from aiockpt.protocol.messages import Enlisted, FromHub, Message, NoHub, Reserved, Setup
from aiockpt.staging.guard import refuse_capture
from aiockpt.staging.stager import Stager
from aiockpt.state.collect import Collected
from aiockpt.storage.claim import RunClaim
from aiockpt.storage.faults import NO_FAULTS, Faults
from aiockpt.storage.followed_run import FollowedRun
from aiockpt.worker.link import Link

__all__ = ["Coordinator"]

_log = logging.getLogger("aiockpt.coordinator")

T = TypeVar("T")

ABANDON_SECONDS = 5.0
"""For the worker to confirm a cancellation at close; it is killed a little later anyway."""
EXIT_SECONDS = 30.0
"""At the interpreter's exit: for copies that are under way to end, so that the worker can finish the save."""


class Coordinator:
    """One run, opened once. Every public method may be called from any thread; none of them but ``save`` waits long.

    It owns the loop's thread, the claim on the run, the worker (through the supervisor), the arena and the stager.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.faults: Faults = NO_FAULTS
        """For tests: what the trainer's own file operations and phases run into."""
        self.worker_faults: tuple[str, str] | None = None
        self._pid = os.getpid()
        self._schedule: WhenToSave = Schedule(options.every, time.monotonic())
        self._pacing: Pacing | None = None
        """That, where there are several ranks."""
        self._desk = Desk()
        self._tally = Tally()
        self.spans = Spans(options.observer, run=options.run, on_left_out=partial(self._tally.count, "dropped_spans"))
        self._loop: LoopThread | None = None
        self._closing = False
        self._first_up: Future[None] = Future()
        self._run: OpenRun | None = None
        self._job: Job | None = None
        """Where there are several ranks."""

    # ---- open

    def open(self) -> Future[None]:
        """Take the run and start the worker."""
        self.check_process()
        if self._loop is not None:
            raise UsageError(
                "the checkpointer was opened twice",
                why="it is open, or was closed",
                next="make a new Checkpointer for another opening",
            )
        check_system()
        self._loop = LoopThread("aiockpt-coordinator")
        self._stager = Stager(
            snapshot=self.options.snapshot,
            stall_timeout=self.options.stall_timeout,
            on_guard_wait=self._tally.guard_waited,
        )
        self._loop.start()
        group = find_group(self.options.process_group)
        if group is not None:
            self._job = Job(self.options, group, self._loop, self.faults)
            self._schedule = self._pacing = self._paced(self._job)
        self._loop.submit(self._make).result()
        remember(self)
        self.spans.start()
        return self._loop.submit(self._open, self.spans.begin("open"))

    async def _make(self) -> None:
        # In our own loop: made in the caller's, anyio's events and limiters would belong to that, trio perhaps.
        await anyio.lowlevel.checkpoint()
        self._left = anyio.Event()
        self._arena = ArenaOwner(self.options.capacity)
        self._supervisor = Supervisor(self.options, self, self.spans)
        self._supervisor.faults = self.worker_faults

    async def _open(self, span: OpenSpan) -> None:
        assert self._loop is not None
        with span:
            claim = await self._hold_run()
            if self._closing:
                claim.release()
                raise failures.closed()
            self._run = OpenRun(
                self.options,
                claim,
                loop=self._loop,
                desk=self._desk,
                arena=self._arena,
                stager=self._stager,
                schedule=self._schedule,
                spans=self.spans,
                tally=self._tally,
                faults=self.faults,
                job=self._job,
            )
            self._loop.tasks.start_soon(self._supervise, span)
            if self._job is not None:
                self._loop.tasks.start_soon(self._job.form, claim, self._stop_if_closing)
                self._loop.tasks.start_soon(self._job.beat, self._beat_interval)
            if self._pacing is not None:
                self._loop.tasks.start_soon(self._pacing.run)
            up = anyio.Event()
            self._first_up.add_done_callback(lambda _: up.set())
            await up.wait()
            self._first_up.result()

    def _paced(self, job: Job) -> Pacing:
        """Return what tells when to save, on all ranks alike."""
        pacing = Pacing(
            self.options.every,
            is_first=job.ranks.rank == 0,
            say=job.say,
            stall_timeout=self.options.stall_timeout,
            now=time.monotonic(),
        )
        if isinstance(self._schedule, Schedule) and self._schedule.requested is not None:
            pacing.request(self._schedule.requested)
        job.subscribers.append(pacing)
        return pacing

    async def _hold_run(self) -> HeldRun:
        job = self._job
        if job is not None and job.ranks.rank:
            return FollowedRun(self.options.run, "", 0)
        try:
            return await anyio.to_thread.run_sync(self._take_run)
        except CheckpointError as exc:
            if job is not None:
                await job.publish_failure(exc)
            raise

    def _take_run(self) -> RunClaim:
        return RunClaim.take(
            self.options.run,
            linger_timeout=self.options.linger_timeout,
            on_wait=self._stop_if_closing,
            faults=self.faults,
        )

    def _stop_if_closing(self, _: str) -> None:
        if self._closing:
            raise failures.closed()

    async def _supervise(self, opening: OpenSpan) -> None:
        try:
            await self._supervisor.run(opening)
        except Exception as exc:
            _log.exception("the supervisor failed")
            self.supervision_over(CheckpointError("the supervisor of the worker failed", why=repr(exc)))
            raise

    @property
    def _opened(self) -> OpenRun:
        assert self._run is not None, "only what comes after _open asks for it"
        return self._run

    # ---- the worker's tenant

    def setup(self) -> Setup:
        """See ``supervisor.Tenant``."""
        return Setup(
            run=self.options.run,
            term=self._opened.claim.term,
            linger_timeout=self.options.linger_timeout,
            beat_interval=self._beat_interval,
            rank=0 if self._job is None else self._job.ranks.rank,
        )

    @property
    def _beat_interval(self) -> float:
        """Seconds between two signs of life, each way."""
        stall = self.options.stall_timeout
        return 1.0 if stall is None else min(1.0, stall / 4)

    def worker_up(self, link: Link) -> None:
        """See ``supervisor.Tenant``."""
        self._arena.worker_up(link)
        self._opened.saves.worker_up(link)
        if self._job is not None:
            self._job.worker_up(link)
        if not self._first_up.done():
            self._first_up.set_result(None)

    def worker_says(self, message: Message, fds: list[int]) -> None:
        """See ``supervisor.Tenant``."""
        if isinstance(message, Reserved):
            self._arena.worker_says(message, fds)
        elif isinstance(message, Enlisted | NoHub | FromHub):
            if self._job is not None:
                self._job.worker_says(message)
        else:
            self._opened.saves.worker_says(message)

    async def worker_down(self, error: CheckpointError) -> None:
        """See ``supervisor.Tenant``."""
        self._arena.worker_down(error)
        if self._job is not None:
            self._job.worker_down()
        await self._opened.saves.worker_down(error)

    def supervision_over(self, error: CheckpointError) -> None:
        """See ``supervisor.Tenant``."""
        self._desk.close(error.copy)
        self._arena.over(error)
        self._opened.saves.fail_all(lambda _: error.copy())
        if self._job is not None and self._loop is not None:
            self._loop.tasks.start_soon(self._job.give_up, error)
        if not self._first_up.done():
            self._first_up.set_exception(error)

    # ---- saving

    @property
    def saving(self) -> Saving:
        """The part of a save that the calling thread does."""
        self.check_open()
        return self._opened.saving

    def cancel(self, save: SaveRecord) -> None:
        """Ask for the end of a save."""
        if self._loop is not None and self._run is not None:
            self._loop.post(self._run.saves.cancel, save)

    def prepare(self, state: Mapping[str, Any]) -> Future[None]:
        """Make the arena for ``state``; reads the state in the calling thread, the rest goes on behind it."""
        loop = self.check_open()
        if self._job is not None:
            self._job.check()
        refuse_capture("prepare()")
        span = self.spans.begin("prepare")
        with span.unless_it_fails():
            saving = self._opened.saving
            plan, collected = saving.plan(state)
            arena_nbytes = saving.arena_nbytes(plan, collected)
        return loop.submit(self._prepare, plan, collected, arena_nbytes, span)

    async def _prepare(self, plan: LocalPlan, collected: Collected, arena_nbytes: int, span: OpenSpan) -> None:
        me = object()
        with span:
            while not self._desk.take_slot(me):
                await wait_for(self._desk.when_free())
            try:
                arena = await self._arena.ensure(arena_nbytes, collected.cuda_device())
                await anyio.to_thread.run_sync(self._stager.prepare, plan, collected, arena)
                self._opened.saving.prepare(plan, collected)
            finally:
                self._desk.free_slot(me)
            span.note(nbytes=plan.data_nbytes)

    def due(self, step: int) -> str | None:
        """Return why ``step`` should be saved, or None."""
        return self._schedule.due(step, time.monotonic())

    def request_save(self, reason: str) -> None:
        """Make ``due`` answer ``reason`` until the next save begins; safe in a signal handler."""
        self._schedule.request(reason)

    def when_ready(self) -> Future[None]:
        """Done when the slot is free."""
        self.check_open()
        return self._desk.when_free()

    def when_idle(self) -> Future[None]:
        """Done when every save has its outcome."""
        self.check_open()
        return self._desk.when_idle()

    # ---- reading

    def read(self, call: Callable[[Restoring], T]) -> Future[T]:
        """Run a reading call of ``Restoring`` in a thread, once no save of ours is open."""
        return self.check_open().submit(self._read, call)

    async def _read(self, call: Callable[[Restoring], T]) -> T:
        await wait_for(self._desk.when_idle())
        return await anyio.to_thread.run_sync(call, self._opened.restoring)

    @property
    def restoring(self) -> Restoring:
        """The part of a restore that the calling thread does."""
        self.check_open()
        return self._opened.restoring

    def statistics(self) -> Statistics:
        """Return the figures since ``open``."""
        self.check_open()
        holder = self._desk.holder
        return self._tally.statistics(
            in_flight=len(self._desk.in_flight()),
            plans=self._opened.saving.plans.misses,
            arena_capacity=self.options.capacity,
            arena_nbytes=self._arena.nbytes,
            arena_used_nbytes=holder.arena_nbytes if isinstance(holder, SaveRecord) else 0,
            arena_pinned=self._arena.is_pinned,
            worker_pid=self._supervisor.pid,
            worker_private_nbytes=self._supervisor.private_nbytes,
            worker_restarts=self._supervisor.restarts,
        )

    # ---- close

    def close(self, *, drain: bool) -> Future[None]:
        """End everything; done when nothing is left. Calling it again gives the same future."""
        if self._loop is None or self._pid != os.getpid():
            nothing: Future[None] = Future()
            nothing.set_result(None)
            return nothing
        if not self._closing:
            self._closing = True
            self._loop.submit(self._close, drain, self.spans.begin("close"))
        return self._loop.ended

    def leave(self) -> None:
        """Stop waiting in ``close``: what is staged is left to the worker."""
        if self._loop is not None:
            self._loop.post(self._left.set)

    def unheard(self) -> list[BaseException]:
        """Return the failures that nobody was told of, once."""
        return [save.failure for save in self._desk.take_unheard() if save.failure is not None]

    async def _close(self, drain: bool, span: OpenSpan) -> None:
        assert self._loop is not None
        try:
            with span:
                await self._wind_down(drain)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self.spans.close)
            self._loop.stop()

    async def _wind_down(self, drain: bool) -> None:
        deadline = anyio.current_time() + (self.options.close_timeout or float("inf"))
        try:
            self._desk.close(failures.closed)
            if self._job is not None:
                self._job.closing()
            why = "close_timeout passed" if drain else "close(drain=False)"
            if self._run is not None:
                await self._end_saves(self._run.saves, drain, deadline, why)
            if self._left.is_set():
                await self._supervisor.leave()
            else:
                await self._supervisor.close(max(1.0, deadline - anyio.current_time()))
            if self._run is not None:
                await self._run.saves.end_all(why)
            if self._job is not None:
                await self._job.wait_left()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._release)

    async def _end_saves(self, saves: Saves, drain: bool, deadline: float, why: str) -> None:
        if drain:
            with anyio.move_on_at(deadline):
                await wait_for(self._desk.when_idle(), self._left)
        if self._left.is_set():  # the worker is to finish what is staged
            saves.fail_all(failures.left)
            return
        for save in self._desk.in_flight():
            saves.give_up(save, failures.abandoned(save, why))
        with anyio.move_on_after(ABANDON_SECONDS):
            await wait_for(self._desk.when_idle())

    def _release(self) -> None:
        self._stager.close()
        self._arena.close()
        if self._job is not None:
            self._job.close()
        if self._run is not None:
            self._run.saving.close()
            self._run.claim.release()
        forget(self)

    def abandon(self) -> None:
        """The Checkpointer was garbage collected without close: finish in the background what is staged."""
        if self._loop is None or self._closing or self._pid != os.getpid():
            return
        warnings.warn(f"unclosed Checkpointer of {self.options.run}", ResourceWarning, stacklevel=2)
        self.close(drain=True).add_done_callback(lambda _: self._log_unheard())

    def abandon_at_exit(self) -> None:
        """The interpreter ends without close: see that the worker has everything, then let go."""
        if self._loop is None or self._pid != os.getpid():
            return
        if self._closing:
            concurrent.futures.wait([self._loop.ended], EXIT_SECONDS)
            return
        warnings.warn(f"unclosed Checkpointer of {self.options.run}", ResourceWarning, stacklevel=2)
        deadline = time.monotonic() + EXIT_SECONDS
        for save in self._desk.in_flight():
            save.wait_handed_over(max(0.0, deadline - time.monotonic()))
        self.spans.close()
        self._log_unheard()

    def park_at_exit(self) -> None:
        """The threads of the program have ended: stop for good, and tell whoever asks later what was left."""
        if self._loop is not None and self._pid == os.getpid() and self._loop.park() and self._run is not None:
            self._desk.close(failures.closed)
            self._run.saves.fail_all(failures.left)

    def _log_unheard(self) -> None:
        for error in self.unheard():
            _log.error("a save failed and nobody was told:\n%s", error)

    # ---- who may call

    def check_process(self) -> None:
        """Refuse a call from a forked child.

        Raises:
            UsageError: This is not the process that made the Checkpointer.
        """
        if self._pid != os.getpid():
            raise failures.forked(self._pid)

    def check_open(self) -> LoopThread:
        """Refuse a call before open, after close, or from a forked child.

        Raises:
            UsageError: Says which.
        """
        self.check_process()
        if self._closing:
            raise failures.closed()
        if self._loop is None or not self._first_up.done():
            raise failures.not_open()
        return self._loop

    def forget_in_child(self) -> None:
        """In a forked child: drop what was inherited. The object is foreign there, see ``check_process``."""
        self._stager.forget_in_child()
        self._arena.forget_in_child()
        self._supervisor.forget_in_child()
        self.spans.forget_in_child()
        if self._job is not None:
            self._job.forget_in_child()
        if self._run is not None:
            self._run.saving.forget_in_child()
            self._run.claim.forget_in_child()
