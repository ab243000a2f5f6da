"""One save in flight as the trainer sees it."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple

from aiockpt.coordinator.results import Saved
from aiockpt.coordinator.spans import NO_SPAN, OpenSpan
from aiockpt.protocol.lifecycle import FINAL, SaveEvent, SaveState, advance
from aiockpt.protocol.messages import BeginSave, EndStaging, Staged
from aiockpt.protocol.star import Arguments

__all__ = ["JobCall", "SaveRecord"]


class JobCall(NamedTuple):
    """One call of ``save`` on all ranks of a job."""

    n: int
    arguments: Arguments


class SaveRecord:
    """State, progress and outcome of one save.

    The coordinator's loop alone moves it on; the thread that saves fills it before the loop sees it. The two futures
    are for any thread: ``staged`` (the caller may write to the state again) and ``outcome``.
    """

    def __init__(
        self, step: int, *, timeout: float | None, spent: Callable[[str, float], None] = lambda phase, seconds: None
    ) -> None:
        """Begin now; ``spent`` is told of every phase and its seconds."""
        self.save_id = uuid.uuid4().hex
        self.step = step
        self.overwrite = False
        self.timeout = timeout
        self.state = SaveState.PLANNED
        self.outcome: Future[Saved | None] = Future()
        self.staged: Future[None] = Future()
        self.started_at = time.monotonic()
        self.timings: dict[str, float] = {}
        self.span = NO_SPAN
        """Of the save as a whole."""
        self.stage_span = NO_SPAN
        self.work_span = NO_SPAN
        """Of what the worker does for it just now, writing or committing."""
        self.staged_nbytes = 0
        """Bytes that its snapshot has."""
        self.arena_nbytes = 0
        """Bytes that it takes of the arena."""
        self.written_nbytes = 0
        """Bytes that the worker has written in this attempt."""
        self.begin: BeginSave | None = None
        self.end: EndStaging | None = None
        self.staging: Any = None
        self.call: JobCall | None = None
        """Where there are several ranks: which of their calls it is."""
        self.values = b"[]"
        self.own_values = b"[]"
        self.metadata = b"null"
        self.probe: Any = None
        """Samples of what is declared to be replicated, on their way."""
        self.probes: dict[str, dict[str, str]] = {}
        """What these are, by group and name, once all is staged."""
        self.copying = False
        """Whether a thread of ours reads the state or writes to the arena."""
        self.with_worker = False
        """Whether the worker may read the arena for it."""
        self.deaths = 0
        self.is_written = False
        """With several ranks: whether a worker that died may have told the hub that this rank has written all."""
        self.cancelling: BaseException | None = None
        """What the outcome becomes when the worker confirms the cancellation."""
        self._upto: dict[int, int] = {}
        self._lock = threading.RLock()  # callbacks of a future run inside, and may come back
        self._handed_over = threading.Event()
        self.listeners = 0
        """Threads and tasks that wait for the outcome now."""
        self.heard = False
        """Whether somebody was told of the failure."""
        self._spent = spent

    def move(self, event: SaveEvent) -> None:
        """Go on by one transition of the table."""
        self.state = advance(self.state, event)

    @property
    def is_final(self) -> bool:
        """Whether the outcome is known."""
        return self.state in FINAL

    @property
    def failure(self) -> BaseException | None:
        """What failed, where something did."""
        return self.outcome.exception() if self.outcome.done() else None

    def elapsed(self) -> float:
        """Seconds since the call of ``save()``."""
        return time.monotonic() - self.started_at

    def stamp(self, name: str) -> None:
        """Note how long after the call something is reached, now."""
        self.spend(name, self.elapsed())

    def spend(self, phase: str, seconds: float) -> None:
        """Note how long a phase took."""
        self.timings[phase] = seconds
        self._spent(phase, seconds)

    @contextmanager
    def phase(self, name: str, **attributes: int) -> Iterator[OpenSpan]:
        """Note how long the block takes, and tell the observer of it."""
        began = self.elapsed()
        with self.span.begin(name, **attributes) as span:
            yield span
        self.spend(name, self.elapsed() - began)

    def settle_staged(self, error: BaseException | None) -> None:
        """Tell who waits for staging how it ended; the first word counts. From any thread."""
        with self._lock:
            if self.staged.done():
                return
            if error is None:
                self.staged.set_result(None)
            else:
                self.staged.set_exception(error)

    def wait_handed_over(self, timeout: float) -> bool:
        """Hold the thread until the worker has all that it needs, or the outcome is known."""
        return self._handed_over.wait(timeout)

    def handed_over(self) -> None:
        """Note that the worker was sent all that it needs, or needs nothing any more."""
        self._handed_over.set()

    def taken_back(self) -> None:
        """Note that the worker is gone, and the next one needs all of it again."""
        self._handed_over.clear()

    def note_staged(self, file: int, upto: int) -> None:
        """Remember how much of a file is staged; from any thread."""
        with self._lock:
            self._upto[file] = upto

    def replay(self) -> list[BeginSave | Staged | EndStaging]:
        """Return what the next worker must hear to go on with this save."""
        assert self.begin is not None
        with self._lock:
            uptos = dict(self._upto)
        frames: list[BeginSave | Staged | EndStaging] = [self.begin]
        frames += [Staged(save_id=self.save_id, file=file, upto=upto) for file, upto in sorted(uptos.items())]
        if self.end is not None:
            frames.append(self.end)
        return frames
