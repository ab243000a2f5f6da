"""The half of a save that runs in the calling thread: admit, collect, plan, copy."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

from aiockpt.config import Options
from aiockpt.coordinator.arena_owner import ArenaOwner
from aiockpt.coordinator.desk import Desk
from aiockpt.coordinator.garbage import collector_paused
from aiockpt.coordinator.job import Job
from aiockpt.coordinator.loop_thread import LoopThread
from aiockpt.coordinator.retention import to_prune
from aiockpt.coordinator.save_record import JobCall, SaveRecord
from aiockpt.coordinator.saves import Saves
from aiockpt.coordinator.schedule import WhenToSave
from aiockpt.coordinator.spans import UNOBSERVED, Spans
from aiockpt.errors import (
    CheckpointError,
    ConfigError,
    SaveBusyError,
    SaveCancelledError,
    StepExistsError,
    UsageError,
)
from aiockpt.planning.local import LocalPlan, PlanCache, plan_local
from aiockpt.protocol.lifecycle import SaveEvent
from aiockpt.protocol.messages import BeginSave, RankCall
from aiockpt.protocol.star import Arguments
from aiockpt.staging.arena import ArenaView
from aiockpt.staging.guard import refuse_capture
from aiockpt.staging.probes import Probe, Prober
from aiockpt.staging.stager import Stager
from aiockpt.state.collect import Collected, collect
from aiockpt.state.expected import expected_entries
from aiockpt.state.ranks import ALONE
from aiockpt.state.values import encode_metadata, encode_values
from aiockpt.storage.faults import FaultPoint, Faults

__all__ = ["Saving", "WhenBusy"]

_log = logging.getLogger("aiockpt.save")

WhenBusy = Literal["wait", "skip", "raise"]

PATIENCE_SECONDS = 1.0
"""After which a thread that ``save()`` holds is told why."""


class Call(NamedTuple):
    """The arguments of ``save()``."""

    step: int
    state: Mapping[str, Any]
    timeout: float | None
    when_busy: WhenBusy
    overwrite: bool
    metadata: Any


class Saving:
    """Everything that ``save()`` does before it returns; one thread at a time."""

    def __init__(
        self,
        options: Options,
        *,
        loop: LoopThread,
        desk: Desk,
        saves: Saves,
        arena: ArenaOwner,
        stager: Stager,
        schedule: WhenToSave,
        highest_ordinal: int,
        faults: Faults,
        spans: Spans = UNOBSERVED,
        job: Job | None = None,
    ) -> None:
        self._options = options
        self._loop = loop
        self._desk = desk
        self._saves = saves
        self._arena = arena
        self._stager = stager
        self._schedule = schedule
        self._ordinal = highest_ordinal
        self._spans = spans
        self._tally = saves.tally
        self._faults = faults
        self._texts_in: tuple[LocalPlan, ArenaView] | None = None
        self._busy = threading.Lock()
        self._job = job
        self._ranks = ALONE if job is None else job.ranks
        self._prober = None if job is None else Prober(job.ranks.rank)
        self.plans = PlanCache(rank=self._ranks.rank, world=self._ranks.world)
        self.branch: frozenset[str] = frozenset()
        """Save ids of checkpoints on an abandoned branch, which a save replaces without ``overwrite``."""

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        timeout: float | None,
        when_busy: WhenBusy,
        overwrite: bool,
        metadata: Any,
    ) -> SaveRecord:
        """Take the snapshot; returns when training may go on.

        Raises:
            CheckpointError: As ``Checkpointer.save`` lists; nothing was begun.
        """
        with self._one_thread():
            return self._save(Call(step, state, timeout, when_busy, overwrite, metadata))

    def prepare(self, plan: LocalPlan, collected: Collected) -> None:
        """Make what the first save would make else; the slot is held."""
        if self._prober is not None:
            self._prober.prepare(plan, collected)

    def close(self) -> None:
        """Let go of what saves keep between them; none is under way."""
        if self._prober is not None:
            self._prober.close()

    def forget_in_child(self) -> None:
        """In a forked child: close what was inherited."""
        if self._prober is not None:
            self._prober.forget_in_child()

    def plan(self, state: Mapping[str, Any]) -> tuple[LocalPlan, Collected]:
        """Return the plan that a save of ``state`` would have, and what it is of."""
        collected = collect(state, ranks=self._ranks, replicated=self._options.replicated)
        return self.plans.plan(collected.entries, collected.tree, collected.plain_files), collected

    def arena_nbytes(self, plan: LocalPlan, collected: Collected) -> int:
        """Return the shared memory that saves of this state take, also once its optimizers have stepped."""
        expected = expected_entries(collected)
        if not expected:
            return plan.arena_nbytes
        entries = [*collected.entries, *expected]
        rank, world = self._ranks.rank, self._ranks.world
        return plan_local(entries, collected.tree, collected.plain_files, rank=rank, world=world).arena_nbytes

    @contextmanager
    def _one_thread(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise UsageError(
                "save() was called while another thread, or a signal handler's victim, is in it",
                why="a snapshot is taken by one thread at a time",
                next="save from one thread; from a signal handler call request_save()",
            )
        try:
            yield
        finally:
            self._busy.release()

    def _save(self, call: Call) -> SaveRecord:
        _check_arguments(call.step, call.timeout, call.when_busy)
        refuse_capture("save()")
        with ExitStack() as paused:
            with self._counted(call) as job_call:
                self._raise_unheard(call.step)
                self._replaces(call.step, call.overwrite)
                record = SaveRecord(call.step, timeout=call.timeout, spent=self._tally.spent)
                record.call = job_call
                record.metadata = encode_metadata(call.metadata)
                record.span = self._spans.begin("save", step=call.step, save_id=record.save_id)
                with record.span.unless_it_fails():
                    if not self._admit(record, call.when_busy):
                        return self._skip(record)
                # Until the copy is made: let loose half-way it would meet all that collecting has made.
                paused.enter_context(collector_paused())
                plan, collected = self._begin_snapshot(record, call)
            self._stage(record, plan, collected)
        record.stamp("blocked")
        return record

    @contextmanager
    def _counted(self, call: Call) -> Iterator[JobCall | None]:
        """Number the call, where there are several ranks; what raises before the save has begun fails it on all."""
        job = self._job
        if job is None:
            yield None
            return
        job.check()
        arguments = Arguments(step=call.step, overwrite=call.overwrite, when_busy=call.when_busy, timeout=call.timeout)
        n = job.next_call()
        self._schedule.saved(call.step, time.monotonic())  # on all ranks alike, whatever becomes of it
        try:
            yield JobCall(n, arguments)
        except UsageError:
            job.take_back_call()
            raise
        except CheckpointError as exc:
            if isinstance(exc, SaveBusyError) and call.when_busy == "raise":  # every rank hears the same from the hub
                job.skip(n, arguments)
            else:
                job.refuse(n, arguments, exc)
            raise
        except BaseException as exc:
            job.refuse(n, arguments, CheckpointError("save() was interrupted", why=repr(exc)))
            raise

    def _begin_snapshot(self, record: SaveRecord, call: Call) -> tuple[LocalPlan, Collected]:
        try:
            with record.span.unless_it_fails():
                plan, collected = self._collect(record, call)
                self._desk.add(record)
        except BaseException:
            self._desk.free_slot(record)
            raise
        if self._job is None:
            self._schedule.saved(call.step, time.monotonic())
        record.timings |= {f"state_dict:{key}": seconds for key, seconds in collected.slow.items()}
        if call.timeout is not None:
            self._loop.post(self._saves.watch_timeout, record)
        return plan, collected

    def _skip(self, record: SaveRecord) -> SaveRecord:
        record.move(SaveEvent.SKIP)
        if self._job is not None and record.call is not None:
            self._job.skip(*record.call)
        self._tally.count("skipped")
        record.span.complete(skipped=True)
        record.staged.set_result(None)
        record.outcome.set_result(None)
        return record

    def _collect(self, record: SaveRecord, call: Call) -> tuple[LocalPlan, Collected]:
        """Read the state by name, and lay out the files."""
        with record.phase("collect"):
            record.overwrite = self._replaces(call.step, call.overwrite)  # the save before may have committed it
            plan, collected = self.plan(call.state)
            if self._job is None:
                record.values = encode_values(collected.values)
            else:
                record.values = encode_values([collected.values[number] for number in plan.common_values])
                record.own_values = encode_values([collected.values[number] for number in plan.own_values])
                if record.call is not None and self._prober is not None:
                    record.probe = self._prober.take(plan, collected, record.call.n, step=record.step)
        record.staged_nbytes = plan.data_nbytes
        record.arena_nbytes = plan.arena_nbytes
        return plan, collected

    def _stage(self, record: SaveRecord, plan: LocalPlan, collected: Collected) -> None:
        record.copying = True  # whatever ends the save meanwhile: the slot is not free before this thread is through
        try:
            arena = self._arena_for(plan, collected, record)
            if record.outcome.done():  # its time was up
                self._loop.post(self._saves.staging_done, record, None)
                return
            record.begin = self._begin_message(record, plan)
            fresh = self._texts_in != (plan, arena)
            self._texts_in = None
            began = record.elapsed()
            record.stage_span = record.span.begin("stage", nbytes=record.staged_nbytes)
            record.staging = self._stager.stage(
                plan,
                collected,
                arena,
                write_texts=fresh,
                step=record.step,
                on_begin=lambda: self._begin(record),
                on_progress=lambda file, upto: self._progress(record, file, upto),
                on_done=lambda error: self._done(record, began, error),
            )
            self._texts_in = (plan, arena)
        except CheckpointError as exc:
            record.stage_span.fail(exc)
            self._loop.post(self._saves.staging_done, record, exc)
            if isinstance(exc, (ConfigError, UsageError)):
                record.heard = True
                raise
        except BaseException as exc:
            stopped = SaveCancelledError(
                f"the save of step {record.step} was given up", why=f"{exc!r} interrupted save()", step=record.step
            )
            record.heard = True
            record.stage_span.fail(exc)
            self._loop.post(self._saves.staging_done, record, stopped)
            raise

    def _begin_message(self, record: SaveRecord, plan: LocalPlan) -> BeginSave:
        self._ordinal += 1
        known = self._saves.checkpoints
        steps = to_prune(self._options.keep, list(known), record.step)
        return BeginSave(
            save_id=record.save_id,
            step=record.step,
            attempt=0,
            ordinal=self._ordinal,
            overwrite=record.overwrite,
            files=list(plan.files),
            plan_offset=plan.body_offset,
            plan_nbytes=plan.body_nbytes,
            prune=[known[step].path.rpartition("/")[2] for step in steps],
            call=self._rank_call(record, plan),
        )

    @staticmethod
    def _rank_call(record: SaveRecord, plan: LocalPlan) -> RankCall | None:
        if record.call is None:
            return None
        n, arguments = record.call
        return RankCall(
            n=n,
            overwrite=arguments.overwrite,
            when_busy=arguments.when_busy,
            timeout=arguments.timeout,
            digest=plan.digest,
            extra_files=list(plan.extra_files),
            extra_keys=list(plan.extra_keys),
            own=plan.own,
        )

    def _begin(self, record: SaveRecord) -> None:
        record.with_worker = True
        self._loop.post(self._saves.begin, record)
        self._faults.at(FaultPoint.TRAINER_BEGIN_SENT)

    def _progress(self, record: SaveRecord, file: int, upto: int) -> None:
        record.note_staged(file, upto)
        self._loop.post(self._saves.staged, record, file, upto)

    def _done(self, record: SaveRecord, began: float, error: BaseException | None) -> None:
        self._faults.at(FaultPoint.TRAINER_COPIED)
        if error is None and record.probe is not None:
            error = self._read_probe(record, record.probe)
        if error is None:
            record.stamp("staged")
            seconds = record.timings["staged"] - began
            record.spend("stage", seconds)
            self._tally.staged(record.staged_nbytes, seconds)
            record.stage_span.complete()
        else:
            record.stage_span.fail(error)
        # The loop tells who waits for it, when the worker knows.
        if not self._loop.post(self._saves.staging_done, record, error):
            record.settle_staged(error)

    def _read_probe(self, record: SaveRecord, probe: Probe) -> BaseException | None:
        try:
            record.probes = probe.result(self._options.stall_timeout)
        except CheckpointError as exc:
            return exc
        return None

    # ---- before the snapshot

    def _raise_unheard(self, step: int) -> None:
        unheard = self._desk.take_unheard()
        if not unheard:
            return
        first, *others = unheard
        self._desk.put_back(others)
        error = first.failure
        assert error is not None
        error.add_note(f"This is the outcome of the save of step {first.step}, which nobody awaited.")
        error.add_note(f"The save of step {step} was not begun; calling save() again saves.")
        raise error

    def _replaces(self, step: int, overwrite: bool) -> bool:
        known = self._saves.checkpoints.get(step)
        if known is None or overwrite:
            return overwrite
        if known.save_id in self.branch:
            return True
        if self._job is not None:  # one verdict for all ranks, by the handle
            return False
        raise StepExistsError(
            f"step {step} was not saved: the run has a checkpoint of it",
            why=f"{known.path} was committed earlier",
            next="save another step, or pass overwrite=True",
            step=step,
            path=known.path,
        )

    def _admit(self, record: SaveRecord, when_busy: WhenBusy) -> bool:
        if self._desk.take_slot(record):
            return True
        holder = self._desk.holder
        busy_step = holder.step if isinstance(holder, SaveRecord) else None
        busy = "prepare()" if busy_step is None else f"the save of step {busy_step}"
        if self._job is not None and busy_step is None:
            when_busy = "wait"  # no other rank knows of a prepare() here
        if when_busy == "skip":
            return False
        if when_busy == "raise":
            raise SaveBusyError(
                f"step {record.step} was not saved: the slot is taken",
                why=f"{busy} is not finished",
                next='await ckpt.wait_ready() first, save less often, or use when_busy="wait"',
                step=record.step,
                busy_step=busy_step,
            )
        with record.phase("wait"):
            is_mine = self._desk.wait_slot(
                record,
                patience=PATIENCE_SECONDS,
                timeout=record.timeout,
                on_slow=lambda: _log.warning(
                    "save(%d) holds its thread: %s is not finished\n"
                    'next: save less often, await ckpt.wait_ready() before, or use when_busy="skip"',
                    record.step,
                    busy,
                ),
            )
        if not is_mine:
            raise SaveBusyError(
                f"step {record.step} was not saved: no slot became free within {record.timeout:g} s",
                why=f"{busy} is not finished",
                next="give it a longer timeout, or save less often",
                step=record.step,
                busy_step=busy_step,
            )
        return True

    def _arena_for(self, plan: LocalPlan, collected: Collected, record: SaveRecord) -> ArenaView:
        view = self._arena.view
        if view is not None and view.nbytes >= plan.arena_nbytes:
            return view
        with record.phase("reserve", nbytes=plan.arena_nbytes):
            asked: Future[ArenaView] = self._loop.submit(self._arena.ensure, plan.arena_nbytes, collected.cuda_device())
            try:
                return asked.result(PATIENCE_SECONDS)
            except TimeoutError:
                if asked.done():
                    raise
                _log.warning(
                    "save() holds its thread: %.1f GB of shared memory are being made\n"
                    "next: call prepare(state) before training, and no save waits for it",
                    plan.arena_nbytes / 1e9,
                )
                return asked.result()


def _check_arguments(step: object, timeout: object, when_busy: object) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 1 << 63:
        raise ConfigError(
            f"step {step!r} was not saved",
            why="a step is an int from 0 to 2**63 - 1",
            next="pass the training step, as in ckpt.save(100, state)",
            argument="step",
        )
    if when_busy not in ("wait", "skip", "raise"):
        raise ConfigError(
            f"step {step} was not saved",
            why=f"when_busy={when_busy!r} is unknown",
            next='use "wait", "skip" or "raise"',
            argument="when_busy",
        )
    is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if timeout is not None and not (is_number and timeout > 0):  # type: ignore[operator]  # is_number says so
        raise ConfigError(
            f"step {step} was not saved",
            why=f"timeout={timeout!r} is no positive number of seconds",
            next="pass seconds > 0, or None for no limit",
            argument="timeout",
        )
