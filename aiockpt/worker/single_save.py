"""The save of a job with one rank: this worker writes, commits and publishes all of it."""

from __future__ import annotations

import functools
import logging
import time

import anyio

from aiockpt.errors import SaveCancelledError, StorageError
from aiockpt.protocol.lifecycle import SaveEvent, SaveState, advance
from aiockpt.protocol.messages import BeginSave, Committed
from aiockpt.protocol.terms import WireError
from aiockpt.worker.attempt import Attempt
from aiockpt.worker.failures import as_wire_error
from aiockpt.worker.save import Save, Surroundings
from aiockpt.worker.writer import FilesWriter

__all__ = ["SingleSave"]

_log = logging.getLogger("aiockpt.worker")


class SingleSave(Save):
    """See ``Save``."""

    def __init__(self, begin: BeginSave, arena: memoryview, surroundings: Surroundings) -> None:
        super().__init__(begin, arena, surroundings)
        self._cancelling = anyio.CancelScope()
        self._is_published = False
        self._attempt = Attempt(surroundings.run, begin, activity=surroundings.activity, faults=surroundings.faults)
        self._writer = FilesWriter(
            begin.files,
            arena,
            activity=surroundings.activity,
            faults=surroundings.faults,
            limiter=surroundings.writers,
        )

    @property
    def _written(self) -> int:
        return self._writer.written

    def _note_staged(self, file: int, upto: int) -> None:
        self._writer.staged(file, upto)

    def _note_end(self) -> None:
        self._writer.end()

    def cancel(self, error: WireError | None = None) -> None:
        """See ``Save``; there are no other ranks."""
        if self._state in (SaveState.STAGING, SaveState.STAGED, SaveState.WRITTEN):
            self._cancelling.cancel()

    def abandon(self) -> None:
        """See ``Save``."""
        self.cancel()

    async def _run(self) -> None:
        try:
            with self._cancelling:
                await self._write()
            # From here to COMMIT_BEGUN nothing is awaited: a Cancel comes before, or is too late.
            if self._cancelling.cancel_called:
                raise SaveCancelledError(f"the save of step {self.begin.step} was cancelled", step=self.begin.step)
            committed = await self._commit()
        except Exception as exc:  # noqa: BLE001  # whatever it is: this save fails, the worker serves on
            await self._fail(exc)
        else:
            self._succeed(committed)

    async def _write(self) -> None:
        await self._make_room()
        # Only a retry can find itself published; it then waits for the end of staging, and reports.
        self._is_published = self.begin.attempt > 0 and await self._s.in_thread(self._attempt.is_published)
        if not self._is_published:
            attempt_fd = await self._s.in_thread(self._attempt.make)
            await self._writer.run(attempt_fd)
        await self._staged.wait()
        self._move(SaveEvent.FILES_DURABLE)

    async def _commit(self) -> Committed:
        begin, end = self.begin, self._end
        assert end is not None, "nothing is written before the end of staging"
        self._move(SaveEvent.COMMIT_BEGUN)
        began_at = time.monotonic()
        if not self._is_published:
            records = self._writer.records
            with self._arena[begin.plan_offset : begin.plan_offset + begin.plan_nbytes] as view:
                plan = bytes(view)
            await self._s.in_thread(lambda: self._attempt.write_manifest(end, records, plan))
        known, trash = await self._s.in_thread(self._attempt.publish)
        self._state = advance(self._state, SaveEvent.COMMIT_DONE)
        seconds = time.monotonic() - began_at
        pruned = await self._s.in_thread(lambda: self._s.prune(begin.prune))
        for name in [*trash, *pruned.values()]:
            self._s.sweeper.add(name)
        return Committed(
            save_id=begin.save_id,
            path=known.path,
            nbytes=known.nbytes,
            timings={**self._writer.timings, "commit": seconds},
            pruned=list(pruned),
        )

    async def _fail(self, exc: Exception) -> None:
        while isinstance(exc, ExceptionGroup):  # of the writers' task group; the first failure ended the others
            exc = exc.exceptions[0]
        if isinstance(exc, StorageError):
            exc = await self._s.in_thread(functools.partial(self._attempt.explain, exc))
        error = as_wire_error(exc)
        if error.kind == "unknown_commit":
            await self._s.in_thread(self._attempt.leave)
            self._state = advance(self._state, SaveEvent.LOSE)
        else:
            await self._remove()
            is_cancel = error.kind == "cancelled"
            self._state = advance(self._state, SaveEvent.CANCEL if is_cancel else SaveEvent.FAIL)
        self._fail_as(error)

    async def _remove(self) -> None:
        try:
            await self._s.in_thread(self._attempt.remove)
        except OSError as exc:  # a StorageError is one
            _log.warning("%s is left in the run, and removed by the next job there\n%s", self._attempt.name, exc)
