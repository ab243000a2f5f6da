"""The save of one rank among several: writes its own files, and leaves every decision to the hub."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import anyio
import msgspec

from aiockpt.errors import CommitUnknownError, StorageError
from aiockpt.protocol.lifecycle import FINAL, SaveEvent, SaveState, advance
from aiockpt.protocol.messages import BeginSave, Committed, Opened, RankCall
from aiockpt.protocol.star import (
    Arguments,
    Arrive,
    Committing,
    Details,
    Ended,
    Fits,
    GiveUp,
    Open,
    OpenCall,
    StarMessage,
    WantDetails,
    Written,
)
from aiockpt.protocol.terms import WireError
from aiockpt.storage.faults import FaultPoint
from aiockpt.storage.run_directory import find_committed
from aiockpt.worker.attempt import Attempt
from aiockpt.worker.failures import as_wire_error
from aiockpt.worker.rank_files import RankFiles
from aiockpt.worker.save import Save, Surroundings

__all__ = ["RankSave"]

_log = logging.getLogger("aiockpt.worker")


class RankSave(Save):
    """See ``Save``; what the hub says comes by ``hear``.

    Args:
        begin: With a ``call``.
        arena: As ``Save``.
        surroundings: As ``Save``.
        rank: Of this worker.
        say: Tells the hub, or drops it while there is none: then ``say_again`` follows.
    """

    def __init__(
        self,
        begin: BeginSave,
        arena: memoryview,
        surroundings: Surroundings,
        *,
        rank: int,
        say: Callable[[StarMessage], None],
    ) -> None:
        super().__init__(begin, arena, surroundings)
        assert begin.call is not None, "the caller has looked"
        self.call: RankCall = begin.call
        self.opened: OpenCall | None = begin.call.opened
        """Under which id and attempt it was opened last, by this hub or an earlier one."""
        self._rank = rank
        self._say = say
        self._files = RankFiles(begin, arena, surroundings)
        self._open: Open | None = None
        self._extra: list[str] | None = None
        """Folders of undeclared tensors that this rank writes, once the plans are known to fit."""
        self._given_up: GiveUp | None = None
        self._written_said: Written | None = None
        self._outcome: Ended | None = None
        self._is_skipped = False
        self._is_lost = False
        """Whether the outcome is our own guess, as there is nobody who decides."""
        self._news = anyio.Event()
        self._writing = anyio.CancelScope()

    @property
    def body(self) -> bytes:
        """What this rank says of its plan."""
        begin = self.begin
        return bytes(self._arena[begin.plan_offset : begin.plan_offset + begin.plan_nbytes])

    # ---- from the reader

    @property
    def _written(self) -> int:
        return self._files.written

    def _note_staged(self, file: int, upto: int) -> None:
        self._files.staged(file, upto)

    def _note_end(self) -> None:
        self._files.end()

    def cancel(self, error: WireError | None) -> None:
        """Ask the hub for the end of the save, on all ranks."""
        self._give_up(error or self._cancelled())

    def cancel_unheard(self, error: WireError | None) -> None:
        """End it though no hub can be asked yet: the next one hears of that when this rank joins."""
        if self.opened is None:
            self.lose(msgspec.structs.replace(error or self._cancelled(), rank=self._rank), is_certain=True)
        else:  # an earlier hub may have committed it
            self.cancel(error)

    def _cancelled(self) -> WireError:
        what = f"the save of step {self.begin.step} was cancelled"
        return WireError(kind="cancelled", what=what, why="cancel() was called", phase=self._phase)

    def abandon(self) -> None:
        """See ``Save``."""
        what = "its trainer ended before all was staged"
        self._give_up(WireError(kind="peer", what=what, next="look at its log", phase="stage"))

    def trainer_is_silent(self, error: WireError) -> None:
        """Give it up unless all is staged: then it needs its trainer no more."""
        if not self.is_staged:
            self._give_up(msgspec.structs.replace(error, phase="stage"))

    # ---- from the hub

    def hear(self, message: Open | Fits | WantDetails | Committing | Ended) -> None:
        """Take what the hub says of this save."""
        match message:
            case Open(verdict="take"):
                self._reopen(message)
            case Open(verdict=verdict):
                self._s.send(Opened(save_id=self.save_id, verdict=verdict))
                self._is_skipped = True
                self._wake(stop=True)
            case Fits(extra=extra):
                self._extra = extra
                self._wake()
            case WantDetails():
                self._tell_details()
            case Committing() if self._state is SaveState.WRITTEN:
                self._pass(FaultPoint.WORKER_COMMITTING)
                self._move(SaveEvent.COMMIT_BEGUN)
            case Ended():
                self._pass(FaultPoint.WORKER_ENDED)
                self._outcome = message
                self._wake(stop=True)

    def say_again(self) -> None:
        """A hub is there, maybe another one: tell it how far this rank is."""
        call = self.call
        self._say(
            Arrive(
                n=call.n,
                arguments=Arguments(
                    step=self.begin.step, overwrite=call.overwrite, when_busy=call.when_busy, timeout=call.timeout
                ),
                digest=call.digest,
            )
        )
        if self._given_up is not None:
            self._say(self._given_up)
        elif self._written_said is not None:
            self._say(self._written_said)

    def lose(self, error: WireError, *, is_certain: bool) -> None:
        """There is no hub any more, and none will come in time.

        Args:
            error: Why.
            is_certain: The hub said so itself: what it had committed was told before. Else the disk may know.
        """
        if self._outcome is None:  # else the hub said how it ended, and left; this save's task had no turn between
            self._outcome = Ended(n=self.call.n, error=error)
            self._is_lost = not is_certain
            self._wake(stop=True)

    def _reopen(self, message: Open) -> None:
        if self._open is not None and (self._open.save_id, self._open.attempt) == (message.save_id, message.attempt):
            return
        self._pass(FaultPoint.WORKER_OPENED)
        self._open, self._written_said = message, None
        if self._given_up is not None and self._given_up.attempt is not None:
            self._given_up = None  # the attempt before failed here
        elif self._given_up is not None:  # a later hub heard it before it had decided anything, and dropped it
            self._say(self._given_up)
        self.opened = OpenCall(n=message.n, save_id=message.save_id, attempt=message.attempt)
        if self._state in (SaveState.WRITTEN, SaveState.COMMITTING):
            self._move(SaveEvent.WORKER_DIED)  # that of another rank: all write again
        self._s.send(Opened(save_id=self.save_id, verdict="take", opened=self.opened))
        self._wake(stop=True)

    def _give_up(self, error: WireError, attempt: int | None = None) -> None:
        had = self._given_up
        is_news = had is None or (had.attempt is not None and attempt is None)
        if is_news and self._outcome is None and self._state is not SaveState.COMMITTING:
            self._given_up = GiveUp(n=self.call.n, error=error, attempt=attempt)
            self._say(self._given_up)

    def _tell_details(self) -> None:
        if self._end is not None and self._outcome is None:
            details = Details(
                n=self.call.n,
                values=self._end.values,
                metadata=self._end.metadata,
                sums=self._files.sums,
                probes=self._end.probes,
            )
            self._say(details)
            self._pass(FaultPoint.WORKER_DETAILS_SAID)

    def _wake(self, *, stop: bool = False) -> None:
        if stop:
            self._writing.cancel()
        self._news.set()
        self._news = anyio.Event()

    def _pass(self, point: FaultPoint) -> None:
        self._s.faults.at(point, f"step {self.begin.step}")

    @property
    def _phase(self) -> str:
        return "write" if self.is_staged else "stage"

    # ---- its task

    async def _run(self) -> None:
        self.say_again()
        tried: Open | None = None
        while self._outcome is None and not self._is_skipped:
            if self._open is tried or self._given_up is not None:
                await self._news.wait()
                continue
            tried = self._open
            await self._try(tried)
        await self._files.leave()
        if self._is_skipped:
            self._state = advance(self._state, SaveEvent.SKIP)
            self._free_slot()
        else:
            assert self._outcome is not None, "the loop ends by it"
            await self._settle(self._outcome)

    async def _try(self, opened: Open | None) -> None:
        """Write one attempt, and say so; ends early where the hub says something else."""
        assert opened is not None, "the hub has decided"
        self._writing = anyio.CancelScope()
        try:
            with self._writing:
                await self._write(opened)
        except Exception as exc:  # noqa: BLE001  # whatever it is: this save fails, the worker serves on
            await self._fail(exc, opened)

    async def _write(self, opened: Open) -> None:
        if self._rank == 0:  # the one whose worker removes
            await self._make_room()
        begin = msgspec.structs.replace(self.begin, save_id=opened.save_id, attempt=opened.attempt)
        attempt = Attempt(self._s.run, begin, activity=self._s.activity, faults=self._s.faults)
        await self._files.write(attempt)
        await self._staged.wait()
        await self._files.sum_up()
        while self._extra is None:
            await self._news.wait()
        await self._files.write_extra(self._extra)
        if self._state is SaveState.STAGED:
            self._move(SaveEvent.FILES_DURABLE)
        self._say_written(opened)

    def _say_written(self, opened: Open) -> None:
        end = self._end
        assert end is not None, "it was waited for"
        self._written_said = Written(
            n=self.call.n,
            attempt=opened.attempt,
            files=[msgspec.structs.replace(record, rank=self._rank) for record in self._files.records],
            values_sum=self._files.values_sum(end.values),
            tensors_sum=self._files.tensors_sum,
            probes={group: self._files.probes_sum(sums) for group, sums in end.probes.items()},
            own=self.call.own,
            rank_values=end.own_values,
        )
        self._say(self._written_said)
        self._pass(FaultPoint.WORKER_WRITTEN_SAID)

    async def _fail(self, exc: Exception, opened: Open) -> None:
        while isinstance(exc, ExceptionGroup):
            exc = exc.exceptions[0]
        if isinstance(exc, StorageError):
            exc = await self._s.in_thread(functools.partial(self._files.explain, exc))
        error = as_wire_error(exc)
        if error.kind == "internal":
            _log.error("step %d: %s\n%s", self.begin.step, error.why, error.traceback)
        if opened is self._open:  # else it is no news that the old attempt failed
            self._give_up(msgspec.structs.replace(error, phase="write"), opened.attempt)

    async def _settle(self, outcome: Ended) -> None:
        if self._is_lost and self._state in (SaveState.WRITTEN, SaveState.COMMITTING) and outcome.error is not None:
            outcome = await self._look(outcome, outcome.error)
        error = outcome.error
        if error is None:
            while self._state not in FINAL:  # the hub may know before this rank is told of each phase
                self._state = advance(self._state, _ON_THE_WAY[self._state])
            timings = {**self._files.timings, **outcome.timings}
            self._succeed(
                Committed(
                    save_id=self.save_id,
                    path=outcome.path,
                    nbytes=outcome.nbytes,
                    timings=timings,
                    pruned=outcome.pruned,
                )
            )
            return
        is_unknown = error.kind == "unknown_commit" and self._state is SaveState.COMMITTING
        event = SaveEvent.LOSE if is_unknown else SaveEvent.FAIL
        self._state = advance(self._state, event)
        self._fail_as(error)

    async def _look(self, outcome: Ended, error: WireError) -> Ended:
        """See in the run directory what a hub that is gone has done; a committed step has the save's id."""
        run, step = self._s.run, self.begin.step
        opened = self.opened
        assert opened is not None, "it has written"

        def look() -> Ended:
            with self._s.activity.operation(f"look for step {step}"):
                known = find_committed(run.fd, run.path, step)
            if known is not None and known.save_id == opened.save_id:
                return Ended(n=outcome.n, path=known.path, nbytes=known.nbytes)
            raise CommitUnknownError(
                f"nobody can say whether step {step} was saved",
                why=error.why or error.what,
                next="look with steps() once rank 0 is back",
                step=step,
            )

        try:
            return await self._s.in_thread(look)
        except Exception as exc:  # noqa: BLE001  # told as data
            return Ended(n=outcome.n, error=as_wire_error(exc))


_ON_THE_WAY = {
    SaveState.STAGING: SaveEvent.STAGING_DONE,
    SaveState.STAGED: SaveEvent.FILES_DURABLE,
    SaveState.WRITTEN: SaveEvent.COMMIT_BEGUN,
    SaveState.COMMITTING: SaveEvent.COMMIT_DONE,
}
