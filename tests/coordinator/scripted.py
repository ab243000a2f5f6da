"""What stands around the saves of a trainer, scripted: loop, copies, disk, and a worker that keeps to the protocol."""

from __future__ import annotations

import errno
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, cast

from aiockpt.config import Latest, Options
from aiockpt.coordinator.coordinator import Coordinator
from aiockpt.coordinator.desk import Desk
from aiockpt.coordinator.open_run import OpenRun
from aiockpt.coordinator.save_record import SaveRecord
from aiockpt.coordinator.saves import Saves
from aiockpt.coordinator.saving import Saving
from aiockpt.coordinator.schedule import Schedule
from aiockpt.errors import CheckpointError, StorageError
from aiockpt.format.names import attempt_name
from aiockpt.protocol.lifecycle import FINAL, SaveEvent, SaveState, advance
from aiockpt.protocol.messages import (
    BeginSave,
    Cancel,
    Committed,
    EndStaging,
    Failed,
    Message,
    Progress,
    SlotFree,
    Staged,
)
from aiockpt.protocol.terms import WireError
from aiockpt.storage.claim import RunClaim
from aiockpt.storage.faults import NO_FAULTS
from aiockpt.storage.run_directory import Committed as Known

Call = Callable[[], object]


class Loop:
    """Keeps what is posted until ``turn``, so that anything may happen in between."""

    def __init__(self) -> None:
        self.posted: deque[Call] = deque()

    def post(self, call: Callable[..., object], *args: Any) -> bool:
        self.posted.append(lambda: call(*args))
        return True

    def turn(self) -> None:
        if self.posted:
            self.posted.popleft()()


class Tasks:
    """Runs what needs no waiting at once, and keeps the clocks of saves with a time-out."""

    def __init__(self) -> None:
        self.clocks: list[SaveRecord] = []

    def start_soon(self, call: Callable[..., Any], *args: Any) -> None:
        if call.__name__ == "_enforce_timeout":
            self.clocks.append(args[0])
            return
        try:
            call(*args).send(None)
        except StopIteration:
            return
        raise AssertionError(f"{call} waits")


class CountingDesk(Desk):
    """Remembers who gave the slot back."""

    def __init__(self) -> None:
        super().__init__()
        self.freed: Counter[object] = Counter()

    def free_slot(self, holder: SaveRecord | object) -> None:
        if self.holder is holder:
            self.freed[holder] += 1
        super().free_slot(holder)


class Disk:
    """A run directory in words, as the trainer's claim sees it."""

    term = 1

    def __init__(self) -> None:
        self.checkpoints: list[Known] = []
        self.published: dict[int, str] = {}
        self.fenced: list[str] = []
        self.is_broken = False
        self.meanwhile: Call = lambda: None
        """Happens while a fence is under way."""

    def fence(self, name: str) -> bool:
        self.meanwhile()
        if self.is_broken:
            raise StorageError("an attempt was not moved away", errno=errno.EIO)
        assert name not in self.fenced, "a name is never used twice"
        self.fenced.append(name)
        return True

    def find(self, step: int, save_id: str) -> Known | None:
        if self.published.get(step) != save_id:
            return None
        return Known(step=step, term=1, ordinal=1, save_id=save_id, nbytes=1, path=f"/run/step-{step}")


class Link:
    """The trainer's end of a socket."""

    def __init__(self, *inboxes: list[Message] | deque[Message]) -> None:
        self._inboxes = inboxes

    def send(self, message: Message, fd: int | None = None) -> None:
        for inbox in self._inboxes:
            inbox.append(message)

    is_idle = True

    async def wait_idle(self) -> None: ...


class Task:
    """What a worker knows of a save."""

    def __init__(self, begin: BeginSave) -> None:
        self.begin = begin
        self.state = advance(SaveState.PLANNED, SaveEvent.BEGIN)
        self.upto: dict[int, int] = {}
        self.has_ended = False
        self.holds_slot = True
        self.is_published = False


class ScriptedWorker:
    """Takes frames, moves and answers when told to; fails the test where the trainer breaks the protocol."""

    def __init__(self, disk: Disk) -> None:
        self.inbox: deque[Message] = deque()
        self.outbox: deque[Message] = deque()
        self.received: list[Message] = []
        """All that was ever sent to it."""
        self.tasks: dict[str, Task] = {}
        self.is_mad = False
        """Whether it speaks without sense by now, and does no work."""
        self._disk = disk

    @property
    def task(self) -> Task | None:
        """The save in the slot."""
        return next((task for task in self.tasks.values() if task.holds_slot and not self.is_mad), None)

    def told(self, save_id: str) -> list[Message]:
        """Return what it was sent about a save."""
        return [message for message in self.received if getattr(message, "save_id", "") == save_id]

    def take(self) -> None:
        """Handle one frame, as ``worker.service`` does."""
        message = self.inbox.popleft()
        if self.is_mad:
            return
        if isinstance(message, BeginSave):
            assert self.task is None, "a save began while the arena was in use"
            assert message.save_id not in self.tasks, "a save began twice"
            name = attempt_name(message.step, message.save_id, message.attempt)
            assert name not in self._disk.fenced, "a fenced attempt began again"
            self.tasks[message.save_id] = Task(message)
            return
        assert isinstance(message, (Staged, EndStaging, Cancel))
        task = self.tasks.get(message.save_id)
        assert task is not None, "a frame came before its save began"
        if not task.holds_slot:
            return
        match message:
            case Staged():
                assert not task.has_ended, "bytes were announced behind the end of staging"
                task.upto[message.file] = message.upto
            case EndStaging():
                assert not task.has_ended, "staging ended twice"
                task.has_ended = True
                self._move(task, SaveEvent.STAGING_DONE)
            case Cancel() if task.state in (SaveState.STAGING, SaveState.STAGED, SaveState.WRITTEN):
                self._fail(task, "cancelled", SaveEvent.CANCEL)

    def move(self) -> None:
        """Go one step on with the save in the slot."""
        task = self.task
        match task and task.state:
            case SaveState.STAGED:
                self._move(cast("Task", task), SaveEvent.FILES_DURABLE)
            case SaveState.WRITTEN:
                self._move(cast("Task", task), SaveEvent.COMMIT_BEGUN)
            case SaveState.COMMITTING:
                assert task is not None
                if not task.is_published:
                    task.is_published = True
                    self._disk.published[task.begin.step] = task.begin.save_id
                    return
                task.state = advance(task.state, SaveEvent.COMMIT_DONE)
                self.say(Committed(save_id=task.begin.save_id, path="/run/step", nbytes=1, timings={}))
                self._free(task)

    def fail(self) -> None:
        """Meet an errno."""
        task = self.task
        if task is not None and task.state not in FINAL:
            if task.is_published:
                self._fail(task, "unknown_commit", SaveEvent.LOSE)
            else:
                self._fail(task, "storage", SaveEvent.FAIL)

    def say(self, message: Message) -> None:
        self.outbox.append(message)

    def _move(self, task: Task, event: SaveEvent) -> None:
        task.state = advance(task.state, event)
        self.say(Progress(save_id=task.begin.save_id, written=1, state=task.state.value))

    def _fail(self, task: Task, kind: Any, event: SaveEvent) -> None:
        task.state = advance(task.state, event)
        self.say(Failed(save_id=task.begin.save_id, error=WireError(kind=kind, what="it failed", errno=errno.EIO)))
        self._free(task)

    def _free(self, task: Task) -> None:
        task.holds_slot = False
        self.say(SlotFree(save_id=task.begin.save_id))


class Copy:
    """A snapshot being copied."""

    def __init__(self, on_progress: Callable[[int, int], None], on_done: Callable[[BaseException | None], None]):
        self._on_progress = on_progress
        self._on_done = on_done
        self._upto = 0
        self.cancelled: BaseException | None = None
        self.is_done = False

    def cancel(self) -> None:
        self.cancelled = self.cancelled or CheckpointError("the copy was cancelled")

    def progress(self) -> None:
        self._upto += 1
        self._on_progress(0, self._upto)

    def end(self, error: BaseException | None) -> None:
        self.is_done = True
        self._on_done(self.cancelled or error)


class Stager:
    """Begins copies, and ends none by itself."""

    def __init__(self) -> None:
        self.copies: list[Copy] = []
        self.before: Call = lambda: None
        self.meanwhile: Call = lambda: None
        """What happens in ``stage`` before the save begins, and behind that."""

    def stage(self, *_: Any, on_begin: Call, on_progress: Any, on_done: Any, **__: Any) -> Copy:
        self.before()
        on_begin()
        self.meanwhile()
        self.copies.append(Copy(on_progress, on_done))
        return self.copies[-1]

    @property
    def copy(self) -> Copy | None:
        """The one under way."""
        return next((copy for copy in self.copies if not copy.is_done), None)


class Arena:
    """Always large enough."""

    def __init__(self) -> None:
        self.meanwhile: Call = lambda: None
        """Happens when somebody asks for the arena."""

    @property
    def view(self) -> Arena:
        self.meanwhile()
        return self

    nbytes = 1 << 40

    def worker_up(self, link: Any) -> None: ...
    def worker_down(self, error: Any) -> None: ...
    def over(self, error: Any) -> None: ...


class _Run:
    """Stands for ``OpenRun``."""

    def __init__(self, saves: Saves, saving: Saving) -> None:
        self.saves = saves
        self.saving = saving


class Stage:
    """A coordinator whose every surrounding is scripted: one thread, no clock, no process.

    The disk may be a real claim on a real run directory.
    """

    def __init__(self, claim: RunClaim | None = None, keep: Latest | None = None) -> None:
        self.loop, self.tasks, self.desk, self.disk = Loop(), Tasks(), CountingDesk(), Disk()
        self.stager, self.arena = Stager(), Arena()
        options = Options.make("/run", io_timeout=None, keep=keep)
        self.coordinator = Coordinator(options)
        self.coordinator._desk = self.desk
        self.coordinator._arena = cast("Any", self.arena)
        self.coordinator._first_up = Future()
        self.saves = Saves(options, self.desk, claim or cast("Any", self.disk), cast("Any", self.tasks), NO_FAULTS)
        self.saving = Saving(
            options,
            loop=cast("Any", self.loop),
            desk=self.desk,
            saves=self.saves,
            arena=cast("Any", self.arena),
            stager=cast("Any", self.stager),
            schedule=Schedule(None, 0.0),
            highest_ordinal=claim.highest_ordinal if claim else 0,
            faults=NO_FAULTS,
        )
        self.coordinator._run = cast("OpenRun", _Run(self.saves, self.saving))
        self.worker: ScriptedWorker | None = None
        self._may_come_up = True

    def turn_all(self) -> None:
        """Let the loop do everything that was posted."""
        while self.loop.posted:
            self.loop.turn()

    @contextmanager
    def no_worker(self) -> Iterator[None]:
        """Let none come up meanwhile."""
        self._may_come_up = False
        try:
            yield
        finally:
            self._may_come_up = True

    def come_up(self) -> None:
        """Start a worker where none is."""
        if self.worker is None and self._may_come_up and not self.is_over:
            self.worker = ScriptedWorker(self.disk)
            self.coordinator.worker_up(cast("Any", Link(self.worker.inbox, self.worker.received)))

    @property
    def is_over(self) -> bool:
        """Whether there will be no other worker."""
        return self.desk._closed is not None

    def hear(self) -> None:
        """Take the worker's next answer."""
        if self.worker is not None and self.worker.outbox:
            self.coordinator.worker_says(self.worker.outbox.popleft(), [])
