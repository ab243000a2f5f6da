"""The saves in flight on the coordinator's loop: what the worker is told, and what its answers mean."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future

import anyio
import anyio.abc
import anyio.to_thread
import msgspec

from aiockpt.config import Options
from aiockpt.coordinator import failures
from aiockpt.coordinator.desk import Desk
from aiockpt.coordinator.held_run import HeldRun
from aiockpt.coordinator.job import Job
from aiockpt.coordinator.results import Saved
from aiockpt.coordinator.save_record import SaveRecord
from aiockpt.coordinator.statistics import Rate
from aiockpt.coordinator.tally import Tally
from aiockpt.errors import (
    CheckpointError,
    CommitUnknownError,
    ProtocolError,
    SaveBusyError,
    SaveCancelledError,
)
from aiockpt.format.names import attempt_name, parse_step
from aiockpt.protocol.lifecycle import SaveEvent, SaveState
from aiockpt.protocol.messages import Cancel, Committed, EndStaging, Failed, Message, Opened, Progress, SlotFree, Staged
from aiockpt.protocol.star import End, StarMessage
from aiockpt.storage.faults import FaultPoint, Faults
from aiockpt.storage.run_directory import Committed as Known
from aiockpt.worker.link import Link

__all__ = ["Saves"]

_log = logging.getLogger("aiockpt.save")

MAX_DEATHS = 2
"""Workers that may die on one save: the second death is most likely the save's own doing."""

HAND_OVER_SECONDS = 1.0
"""For a worker to take the end of staging; who waits for no more than that may then write to the state, if not die."""

LOOK_SECONDS = 5.0
"""For a look into the run directory at close: where the disk hangs, nobody can say what was published."""


class Saves:
    """Moves every open save along its table. All methods run on the loop."""

    def __init__(
        self,
        options: Options,
        desk: Desk,
        claim: HeldRun,
        tasks: anyio.abc.TaskGroup,
        faults: Faults,
        tally: Tally | None = None,
        job: Job | None = None,
    ) -> None:
        self._options = options
        self._desk = desk
        self._claim = claim
        self._tasks = tasks
        self.tally = tally or Tally()
        self._faults = faults
        self._job = job
        self._link: Link | None = None
        self._freed = ""
        """The save that was committed last; the worker need not say that its slot is free."""
        self._limiter = anyio.CapacityLimiter(1)
        self.checkpoints: dict[int, Known] = {known.step: known for known in claim.checkpoints}
        """Committed ones by step, newest first; replaced as a whole, so that any thread may read it."""

    # ---- from the thread that saves, by way of the loop

    def begin(self, save: SaveRecord) -> None:
        """The slot is the save's and its plan is made: tell the worker."""
        assert save.begin is not None
        if save.is_final:
            save.with_worker = False
            self._maybe_free(save)
            return
        save.move(SaveEvent.BEGIN)
        if self._job is not None and save.begin.call is not None:
            self._job.began(save.begin.call.n)
        _observe_writing(save)
        self._send(save.begin)
        if self._job is not None and self._job.hopeless is not None:  # which save() could not know yet
            self.give_up(save, self._job.hopeless.copy())

    def staged(self, save: SaveRecord, file: int, upto: int) -> None:
        """The first ``upto`` bytes of a file are in the arena."""
        if save.state is SaveState.STAGING:
            self._send(Staged(save_id=save.save_id, file=file, upto=upto))

    def staging_done(self, save: SaveRecord, error: BaseException | None) -> None:
        """All is copied and checked, or staging failed."""
        save.copying = False
        if save.is_final or save.cancelling is not None:
            if error is None:
                save.settle_staged(None)
            self._maybe_free(save)
        elif error is not None:
            self.give_up(save, error)
        else:
            save.move(SaveEvent.STAGING_DONE)
            save.end = EndStaging(
                save_id=save.save_id,
                values=save.values,
                metadata=save.metadata,
                own_values=save.own_values,
                probes=save.probes,
            )
            self._send(save.end)
            self._tasks.start_soon(self._hand_over, save)
            self._faults.at(FaultPoint.TRAINER_STAGED_SENT)

    async def _hand_over(self, save: SaveRecord) -> None:
        """See the end of staging sent, then tell: who was told that all is staged may die, and leaves a checkpoint."""
        link = self._link
        if link is None:  # worker_up comes back to this
            save.settle_staged(None)
            return
        if not link.is_idle:
            with anyio.move_on_after(HAND_OVER_SECONDS):
                await link.wait_idle()
        save.settle_staged(None)
        await link.wait_idle()
        if link is self._link:
            save.handed_over()

    def cancel(self, save: SaveRecord) -> None:
        """The user's wish: who cancels knows of it, so nobody else is told. A failure that came before is told."""
        if self._may_give_up(save):
            save.heard = True
            self.give_up(save, failures.cancelled(save))

    def watch_timeout(self, save: SaveRecord) -> None:
        """Hold the save to its ``timeout``, counted from the call of ``save()``; for several ranks the hub does it."""
        if self._job is None:
            self._tasks.start_soon(self._enforce_timeout, save)

    async def _enforce_timeout(self, save: SaveRecord) -> None:
        assert save.timeout is not None
        await anyio.sleep(max(0.0, save.timeout - save.elapsed()))
        self.give_up(save, failures.timed_out(save))

    def give_up(self, save: SaveRecord, error: BaseException) -> None:
        """Cancel a save; ``error`` is its outcome unless the worker commits it first."""
        if not self._may_give_up(save):
            return
        save.cancelling = error
        if save.staging is not None:
            save.staging.cancel()
        if save.state is SaveState.PLANNED:  # the worker has not heard of it
            if self._job is not None and save.call is not None:
                self._job.refuse(save.call.n, save.call.arguments, _as_checkpoint_error(error))
            self._finish(save, error)
        elif self._link is not None:
            self._send(self._cancel_of(save))
        # else: worker_down settles it

    def _cancel_of(self, save: SaveRecord) -> Cancel:
        assert save.cancelling is not None, "the caller has given it up"
        error = None
        if self._job is not None:
            error = failures.as_data(
                _as_checkpoint_error(save.cancelling), phase="stage" if save.end is None else "write"
            )
        is_unheard = self._job is not None and not self._job.was_in
        return Cancel(save_id=save.save_id, error=error, is_unheard=is_unheard)

    def _may_give_up(self, save: SaveRecord) -> bool:
        return not save.is_final and save.cancelling is None and save.state is not SaveState.COMMITTING

    # ---- from the job

    def hear(self, message: StarMessage) -> None:
        """What the hub says of saves goes to the worker."""

    def rejoined(self) -> None:
        """The worker says again what is open."""

    def fail(self, error: CheckpointError) -> None:
        """There is no hub. Where one knew of a save, the worker finds out how that ended; else nothing was begun."""
        if self._job is not None and self._job.hopeless is not None:
            for save in self._desk.in_flight():
                self.give_up(save, error.copy())

    # ---- from the worker

    def worker_up(self, link: Link) -> None:
        """Go on with what is open."""
        self._link = link
        for save in self._desk.in_flight():
            if save.state is not SaveState.PLANNED:
                _observe_writing(save)
                for frame in save.replay():
                    link.send(frame)
                if save.end is not None:
                    self._tasks.start_soon(self._hand_over, save)
                if save.cancelling is not None:
                    link.send(self._cancel_of(save))

    def worker_says(self, message: Message) -> None:
        """Take an answer; one for a save that is not open is dropped and counted.

        Raises:
            ProtocolError: It cannot be true.
        """
        holder = self._desk.holder
        if isinstance(message, SlotFree) and isinstance(holder, SaveRecord) and holder.save_id == message.save_id:
            holder.with_worker = False
            self._maybe_free(holder)
            return
        save = self._desk.find(getattr(message, "save_id", ""))
        if save is None:
            if not (isinstance(message, SlotFree) and message.save_id == self._freed):
                self.tally.count("dropped_answers")
            return
        _check_answer(message, save)
        match message:
            case Progress():
                self._progress(save, message)
            case Committed():
                self._committed(save, message.path, message.nbytes, message.timings, message.pruned)
            case Failed():
                rank = 0 if self._job is None else self._job.ranks.rank
                self._finish(save, failures.as_exception(message.error, save, rank))
            case Opened():
                self._opened(save, message)

    async def worker_down(self, error: CheckpointError) -> None:
        """Settle every save that the dead worker had in hand, behind the fence."""
        self._link = None
        for save in self._desk.in_flight():
            if save.state is not SaveState.PLANNED:
                await self._settle(save, error)
        holder = self._desk.holder
        if isinstance(holder, SaveRecord) and holder.is_final:
            holder.with_worker = False
            self._maybe_free(holder)

    def forget(self, step: int) -> None:
        """A checkpoint is gone, or was renamed as bad."""
        self.checkpoints = {other: known for other, known in self.checkpoints.items() if other != step}

    def fail_all(self, error: Callable[[SaveRecord], CheckpointError]) -> None:
        """There will be no worker for us: nothing that is open can be followed to its end."""
        self._link = None
        for save in self._desk.in_flight():
            if save.staging is not None:
                save.staging.cancel()
            save.with_worker = False
            outcome = save.cancelling or error(save)
            if save.is_written:  # the other ranks may still commit it
                outcome = failures.unknown(save, f"this rank has left it to the others: {outcome}")
            self._finish(save, outcome)

    async def end_all(self, why: str) -> None:
        """The last worker is gone, at close: what it had published decides about all that is still open."""
        self._link = None
        for save in self._desk.in_flight():
            found: Future[Known | None] = Future()
            with anyio.move_on_after(LOOK_SECONDS):
                await anyio.to_thread.run_sync(
                    self._fence_and_look, save, found, limiter=self._limiter, abandon_on_cancel=True
                )
            save.with_worker = False
            is_known = found.done() and found.exception() is None
            if is_known and (known := found.result()) is not None:
                self._committed(save, known.path, known.nbytes, {}, [])
            else:
                self._finish(save, (is_known and save.cancelling) or failures.unknown(save, why))

    # ---- inside

    def _progress(self, save: SaveRecord, message: Progress) -> None:
        self.tally.count("written_nbytes", max(0, message.written - save.written_nbytes))
        save.written_nbytes = message.written
        match message.state, save.state:
            case "written", SaveState.STAGED:
                save.move(SaveEvent.FILES_DURABLE)
                save.work_span.complete(nbytes=message.written)
            case "committing", SaveState.WRITTEN:
                save.move(SaveEvent.COMMIT_BEGUN)
                save.work_span = save.span.begin("commit")

    def _opened(self, save: SaveRecord, message: Opened) -> None:
        """All ranks have decided."""
        if message.verdict == "skip":
            self._skipped(save)
        elif message.verdict == "busy":
            self._finish(save, failures.busy(save))
        elif save.begin is not None and save.begin.call is not None:
            if save.state in (SaveState.WRITTEN, SaveState.COMMITTING):  # a worker of another rank died
                save.move(SaveEvent.WORKER_DIED)
            call = msgspec.structs.replace(save.begin.call, opened=message.opened)
            save.begin = msgspec.structs.replace(save.begin, call=call)

    def _skipped(self, save: SaveRecord) -> None:
        if save.staging is not None:
            save.staging.cancel()
        save.move(SaveEvent.SKIP)
        self.tally.count("skipped")
        save.work_span.complete(skipped=True)
        save.span.complete(skipped=True)
        save.settle_staged(None)
        save.outcome.set_result(None)
        save.handed_over()
        self._end_call(save, "skip")
        self._desk.remove(save)
        self._maybe_free(save)

    def _end_call(self, save: SaveRecord, end: End) -> None:
        if self._job is not None and save.call is not None:
            self._job.ended(save.call.n, end)

    def _send(self, message: Message) -> None:
        if self._link is not None:  # else the next worker is told by replay
            self._link.send(message)

    async def _settle(self, save: SaveRecord, error: CheckpointError) -> None:
        save.deaths += 1
        save.work_span.fail(error)
        found: Future[Known | None] = Future()
        returned = anyio.Event()

        async def run() -> None:
            await anyio.to_thread.run_sync(self._fence_and_look, save, found, limiter=self._limiter)
            returned.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            with anyio.move_on_after(self._options.io_timeout):
                await returned.wait()
            if not returned.is_set():
                self._finish(save, failures.unknown(save, "the run directory did not answer within io_timeout"))
            # The task group waits here: no worker starts before the rename has returned.
        self._settled(save, error, found)

    def _fence_and_look(self, save: SaveRecord, found: Future[Known | None]) -> None:
        """In a thread: see that a late rename finds nothing, then whether one came before."""
        assert save.begin is not None
        save_id, attempt = save.save_id, save.begin.attempt
        if save.begin.call is not None:
            if save.begin.call.opened is None:  # nothing of it was written anywhere
                found.set_result(None)
                return
            save_id, attempt = save.begin.call.opened.save_id, save.begin.call.opened.attempt
        try:
            self._faults.at(FaultPoint.TRAINER_BEFORE_FENCE)
            self._claim.fence(attempt_name(save.step, save_id, attempt))
            found.set_result(self._claim.find(save.step, save_id))
        except BaseException as exc:  # noqa: BLE001  # it is delivered to who asked
            found.set_exception(exc)

    def _settled(self, save: SaveRecord, error: CheckpointError, found: Future[Known | None]) -> None:
        if save.is_final:
            return
        if found.exception() is not None:
            self._finish(save, failures.unknown(save, str(found.exception())))
            return
        known = found.result()
        if known is not None:
            self._committed(save, known.path, known.nbytes, {}, [])
            return
        if save.deaths >= MAX_DEATHS and save.cancelling is None:
            save.cancelling = failures.too_many_deaths(save, error)
        if save.cancelling is not None and self._job is None:
            self._finish(save, save.cancelling)
            return
        # With several ranks the hub may have committed it meanwhile: it is asked by the next worker.
        assert save.begin is not None
        save.is_written |= save.state in (SaveState.WRITTEN, SaveState.COMMITTING)
        save.begin = msgspec.structs.replace(save.begin, attempt=save.begin.attempt + 1)
        save.written_nbytes = 0
        save.taken_back()
        save.move(SaveEvent.WORKER_DIED)
        self.tally.count("retried")

    def _committed(
        self, save: SaveRecord, path: str, nbytes: int, timings: dict[str, float], pruned: list[str]
    ) -> None:
        for event, state in _WAY_TO_COMMIT:
            if save.state is state:
                save.move(event)
        save.stamp("durable")
        for name in ("blocked", "staged"):  # so fast that save() had no turn to return
            save.timings.setdefault(name, save.timings["durable"])
        save.timings |= timings
        gone = {parse_step(name) for name in pruned} | {save.step}
        assert save.begin is not None
        new = Known(
            step=save.step,
            term=self._claim.term,
            ordinal=save.begin.ordinal,
            save_id=save.save_id,
            nbytes=nbytes,
            path=path,
        )
        others = {step: known for step, known in self.checkpoints.items() if step not in gone}
        self.checkpoints = {save.step: new, **others}
        self.tally.committed(save.step, nbytes, timings)
        result = Saved(step=save.step, path=path, nbytes=nbytes, timings=dict(save.timings))
        if self._job is None or self._job.ranks.rank == 0:
            _log_commit(result)
        save.work_span.complete()
        save.span.complete(nbytes=nbytes, path=path)
        save.settle_staged(None)
        # Before anybody hears of it: who awaits a save, and then saves, finds the slot free. What is published is not
        # read again; the worker's own word on that is under way.
        save.with_worker = False
        self._freed = save.save_id
        self._maybe_free(save)
        save.outcome.set_result(result)
        save.handed_over()
        self._end_call(save, "committed")
        self._desk.remove(save)

    def _finish(self, save: SaveRecord, error: BaseException) -> None:
        if save.is_final:
            return
        is_cancel = isinstance(error, SaveCancelledError)
        if isinstance(error, CommitUnknownError) and save.state is SaveState.COMMITTING:
            save.move(SaveEvent.LOSE)
        elif is_cancel and save.state is not SaveState.COMMITTING:
            save.move(SaveEvent.CANCEL)
        else:
            save.move(SaveEvent.FAIL)
        self.tally.failed(error)
        save.work_span.fail(error)
        save.span.fail(error)
        if save.staging is not None:
            save.staging.cancel()
        save.settle_staged(error)
        save.outcome.set_exception(error)
        save.handed_over()
        self._end_call(save, "busy" if isinstance(error, SaveBusyError) else "failed")
        self._desk.remove(save)
        self._maybe_free(save)

    def _maybe_free(self, save: SaveRecord) -> None:
        """Free the slot where nobody needs what lies in it: not before the outcome, as a retry would read it again."""
        if save.is_final and not save.with_worker and not save.copying:
            if self._job is not None and save.call is not None and self._desk.holder is save:
                self._job.freed(save.call.n)
            self._desk.free_slot(save)


_WAY_TO_COMMIT = (
    (SaveEvent.STAGING_DONE, SaveState.STAGING),
    (SaveEvent.FILES_DURABLE, SaveState.STAGED),
    (SaveEvent.COMMIT_BEGUN, SaveState.WRITTEN),
    (SaveEvent.COMMIT_DONE, SaveState.COMMITTING),
)


def _as_checkpoint_error(error: BaseException) -> CheckpointError:
    """Return an error that other ranks can be told of."""
    return error if isinstance(error, CheckpointError) else CheckpointError("the save was given up", why=repr(error))


def _check_answer(message: Message, save: SaveRecord) -> None:
    """Refuse an answer to what was not said: before the end of staging nothing can be committed."""
    if save.state is SaveState.PLANNED or (isinstance(message, Committed) and save.end is None):
        raise ProtocolError(
            f"the worker says {type(message).__name__} of a save that is {save.state.value}",
            why="it was not told enough for that",
            next="the worker is replaced and the save retried",
        )


def _observe_writing(save: SaveRecord) -> None:
    """Begin the span of a worker's writing, unless one is open: the worker may come up behind the save's beginning."""
    assert save.begin is not None
    if not save.work_span.is_open:
        save.work_span = save.span.begin("write", attempt=save.begin.attempt)


def _log_commit(saved: Saved) -> None:
    """Write the one line of a checkpoint: figures for programs to find, in an order for people to read."""
    blocked, staged, durable = (saved.timings[name] for name in ("blocked", "staged", "durable"))
    _log.info(
        "step %d saved: nbytes=%d blocked_s=%.4f staged_s=%.4f durable_s=%.4f gbps=%.3f path=%s",
        *(saved.step, saved.nbytes, blocked, staged, durable, Rate().plus(saved.nbytes, durable).gbps, saved.path),
    )
