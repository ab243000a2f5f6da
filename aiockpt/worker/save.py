"""One save in the worker, from BeginSave to its outcome: what saves of one and of several ranks have in common."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import anyio
import anyio.to_thread

from aiockpt.errors import ProtocolError, StorageError
from aiockpt.format.image import ALIGN, round_up
from aiockpt.format.names import MANIFEST_NAME, attempt_name, parse_attempt, parse_step
from aiockpt.protocol.lifecycle import FINAL, SaveEvent, SaveState, advance
from aiockpt.protocol.messages import (
    BeginSave,
    Committed,
    EndStaging,
    Failed,
    FileImage,
    Message,
    Progress,
    SlotFree,
    Staged,
)
from aiockpt.protocol.terms import WireError
from aiockpt.storage.commit import retire
from aiockpt.storage.faults import Faults
from aiockpt.worker.activity import Activity
from aiockpt.worker.run import Run
from aiockpt.worker.sweeper import Sweeper

__all__ = ["Save", "Surroundings", "check_begin"]

_log = logging.getLogger("aiockpt.worker")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every save of a worker works with."""

    run: Run
    sweeper: Sweeper
    activity: Activity
    faults: Faults
    writers: anyio.CapacityLimiter
    """Threads that write blocks."""
    clerks: anyio.CapacityLimiter
    """Threads that work on directories, so that these never wait behind blocks."""
    send: Callable[[Message], None]

    def prune(self, names: list[str]) -> dict[str, str]:
        """Take old checkpoints out of the run; the new one stands whatever happens here. Blocks.

        Returns:
            Names that are gone, and under which names their directories wait to be deleted.
        """
        pruned = {}
        for name in names:
            try:
                with self.activity.operation(f"retire {name}"):
                    trash = retire(self.run.fd, name, faults=self.faults)
            except StorageError as exc:
                _log.warning("%s was not removed by retention\n%s", name, exc)
                continue
            if trash is not None:
                pruned[name] = trash
        return pruned

    async def in_thread(self, function: Callable[[], _T]) -> _T:
        """Run what blocks on directories."""
        return await anyio.to_thread.run_sync(function, limiter=self.clerks)


class Save(ABC):
    """Moves along ``protocol.lifecycle``; ``run`` is its one task, everything else is called by the reader."""

    def __init__(self, begin: BeginSave, arena: memoryview, surroundings: Surroundings) -> None:
        """Take over ``arena``, which is released when no thread reads it any more."""
        self.save_id = begin.save_id
        self.begin = begin
        self.holds_slot = True
        self._arena = arena
        self._s = surroundings
        self._state = advance(SaveState.PLANNED, SaveEvent.BEGIN)
        self._end: EndStaging | None = None
        self._staged = anyio.Event()
        self._ended = anyio.Event()
        self._reported = 0

    @property
    def is_staged(self) -> bool:
        """Whether it survives its trainer."""
        return self._end is not None

    # ---- from the reader

    def staged(self, message: Staged) -> None:
        """Take note of staged bytes.

        Raises:
            ProtocolError: The plan has no such bytes, or staging had ended.
        """
        if self._end is not None:
            raise ProtocolError("bytes were announced as staged after the end of staging")
        self._note_staged(message.file, message.upto)

    def end_staging(self, message: EndStaging) -> None:
        """Take note that everything is staged and checked.

        Raises:
            ProtocolError: That was said before.
        """
        if self._end is not None:
            raise ProtocolError("staging ended twice")
        self._end = message
        if self._state is SaveState.STAGING:
            self._move(SaveEvent.STAGING_DONE)
        self._note_end()
        self._staged.set()

    @abstractmethod
    def cancel(self, error: WireError | None) -> None:
        """Give the save up, unless it is too late for that; ``error`` is what other ranks are told."""

    @abstractmethod
    def abandon(self) -> None:
        """Give the save up because its trainer is gone before all was staged."""

    def report(self) -> None:
        """Send how much is written, if that is news."""
        if self._written != self._reported and self._state in (SaveState.STAGING, SaveState.STAGED):
            self._send_progress()

    async def wait_ended(self) -> None:
        """Wait until the outcome was sent."""
        await self._ended.wait()

    async def run(self) -> None:
        """Write, commit, report; never raises for a save that fails."""
        try:
            with self._s.sweeper.standing_back():
                await self._run()
        finally:
            self._ended.set()

    # ---- for those who derive from it

    @property
    @abstractmethod
    def _written(self) -> int:
        """Bytes handed to the operating system."""

    @abstractmethod
    def _note_staged(self, file: int, upto: int) -> None:
        """The first ``upto`` bytes of a file are final."""

    @abstractmethod
    def _note_end(self) -> None:
        """All is staged."""

    @abstractmethod
    async def _run(self) -> None:
        """Bring it to its outcome."""

    async def _make_room(self) -> None:
        """Wait for removals under way where the disk is too full without them."""
        sweeper = self._s.sweeper
        if not sweeper.is_idle:
            needed = sum(round_up(image.nbytes) for image in self.begin.files)
            if needed > await self._s.in_thread(lambda: self._s.run.free_nbytes):
                await sweeper.wait_idle()

    def _succeed(self, committed: Committed) -> None:
        if self._state not in FINAL:
            self._state = advance(self._state, SaveEvent.COMMIT_DONE)
        self._s.send(committed)
        self._free_slot()

    def _fail_as(self, error: WireError) -> None:
        if error.kind == "internal":
            _log.error("step %d: %s\n%s", self.begin.step, error.why, error.traceback)
        self._s.send(Failed(save_id=self.save_id, error=error))
        self._free_slot()  # no thread reads the arena: the writers have returned

    def _free_slot(self) -> None:
        self._arena.release()
        self.holds_slot = False
        self._s.send(SlotFree(save_id=self.save_id))

    def _move(self, event: SaveEvent) -> None:
        self._state = advance(self._state, event)
        self._send_progress()

    def _send_progress(self) -> None:
        self._reported = self._written
        self._s.send(Progress(save_id=self.save_id, written=self._reported, state=self._state.value))


def check_begin(begin: BeginSave, arena_nbytes: int) -> None:
    """Check that a save lies in the arena and in its own directory.

    Raises:
        ProtocolError: Says what does not.
    """
    if begin.step < 0 or parse_attempt(attempt_name(begin.step, begin.save_id, begin.attempt)) is None:
        raise ProtocolError("the save has a number or an id that makes no file name")
    ranges = [(image.offset, round_up(image.nbytes)) for image in begin.files]
    if any(start < 0 or length < 0 or start + length > arena_nbytes for start, length in ranges):
        raise ProtocolError("a file of the save lies outside of the arena")
    if min(begin.plan_offset, begin.plan_nbytes) < 0 or begin.plan_offset + begin.plan_nbytes > arena_nbytes:
        raise ProtocolError("the plan of the save lies outside of the arena")
    paths = {image.path for image in begin.files}
    if len(paths) != len(begin.files) or not all(map(_is_good_path, paths)) or not all(map(_is_good, begin.files)):
        raise ProtocolError("the save has files that cannot be")
    if any(parse_step(name) is None for name in begin.prune):
        raise ProtocolError("retention names something that is no checkpoint")


def _is_good_path(path: str) -> bool:
    parts = path.split("/")
    return len(parts) <= 2 and path != MANIFEST_NAME and "\0" not in path and not {"", ".", ".."}.intersection(parts)


def _is_good(image: FileImage) -> bool:
    if image.data_start == 0:
        return True
    is_aligned = image.offset % ALIGN == 0 and image.data_start % ALIGN == 0
    return is_aligned and 0 < image.sums_at < image.data_start <= image.nbytes
