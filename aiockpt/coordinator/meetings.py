"""Meetings of the ranks, as a trainer's threads wait in them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from aiockpt.errors import CheckpointError
from aiockpt.protocol.meeting import Guest
from aiockpt.protocol.star import Attend, Met, StarMessage
from aiockpt.protocol.terms import WireError

__all__ = ["Meetings"]

POLL_SECONDS = 0.05
"""Between two looks whether the caller was interrupted: its event wakes no condition."""
GRACE_SECONDS = 5.0
"""For the hub's answer to a cancellation, before we go without it."""


class Meetings:
    """Outlives this rank's workers. ``meet`` waits, in any thread but the loop's; all else returns at once.

    Args:
        rank: This one.
        world: How many ranks there are.
        say: Passes a message on to the hub, or drops it where there is none just now; called from any thread, with a
            lock held, so it must not wait.
    """

    def __init__(self, rank: int, world: int, say: Callable[[StarMessage], object]) -> None:
        self.rank = rank
        self.world = world
        self._say = say
        self._guest = Guest()
        self._changed = threading.Condition()
        self._failure: CheckpointError | None = None

    # ---- in the loop

    def hear(self, message: StarMessage) -> None:
        """The hub says how a meeting ended; other messages are none of its business."""
        if isinstance(message, Met):
            with self._changed:
                self._guest.hear(message)
                self._changed.notify_all()

    def rejoined(self) -> None:
        """A worker of ours is welcome at the hub, the first one or another: say again what is open."""
        with self._changed:
            self._failure = None
            self._say_all(self._guest.rejoined())

    def fail(self, error: CheckpointError) -> None:
        """No hub comes any more: who waits gets this, and so does who comes before ``rejoined``."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    # ---- in other threads

    def meet(
        self,
        meeting: str,
        *,
        claim: str,
        word: bytes = b"",
        error: WireError | None = None,
        stop: threading.Event | None = None,
    ) -> Met:
        """Come to a meeting, and wait until it has ended; where it did so badly, the answer has the error.

        Args:
            meeting: Its name, the same on all ranks and never used twice.
            claim: What must be the same on all ranks, as people write it.
            word: Of rank 0: what all are told.
            error: Why this rank does not go on.
            stop: Set when the caller no longer wants to: then the meeting ends on all ranks with that, unless they
                have met already. Where no hub answers soon we go without it; it hears of that when it is back.

        Raises:
            CheckpointError: No hub comes any more.
        """
        message = Attend(meeting=meeting, claim=claim, word=word, error=error)
        with self._changed:
            self._say_all(self._guest.attend(message))
            if not self._wait(meeting, None if error is not None else stop):
                cancelled = Attend(meeting=meeting, claim=claim, word=word, error=_cancelled(self.rank))
                self._say_all(self._guest.attend(cancelled))
                self._wait(meeting, None, time.monotonic() + GRACE_SECONDS)
            met = self._guest.answer(meeting)
        return met or Met(meeting=meeting, error=_cancelled(self.rank))

    def excuse(self, meeting: str, *, claim: str, error: WireError) -> None:
        """Say why this rank does not come to a meeting, without waiting for its end."""
        with self._changed:
            self._say_all(self._guest.attend(Attend(meeting=meeting, claim=claim, error=error)))

    def has_ended(self, meeting: str) -> bool:
        """Tell whether a meeting has ended, perhaps before this rank came to it."""
        with self._changed:
            return self._guest.answer(meeting) is not None

    def _wait(self, meeting: str, stop: threading.Event | None, deadline: float = float("inf")) -> bool:
        """Wait for the end of a meeting; False where ``stop`` or the deadline came first."""
        while self._guest.answer(meeting) is None:
            if self._failure is not None:
                self._guest.leave(meeting)
                raise self._failure.copy()
            if (stop is not None and stop.is_set()) or time.monotonic() >= deadline:
                return False
            self._changed.wait(None if stop is None and deadline == float("inf") else POLL_SECONDS)
        return True

    def _say_all(self, messages: Iterable[StarMessage]) -> None:
        for message in messages:
            self._say(message)


def _cancelled(rank: int) -> WireError:
    return WireError(
        kind="cancelled",
        what=f"the restore was cancelled on rank {rank}",
        why="its caller asked for it",
        next="restore again",
        rank=rank,
    )
