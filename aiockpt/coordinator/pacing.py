"""When many ranks save, from one of them: the training thread asks, the coordinator's loop hears the hub."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

import anyio

from aiockpt.config import Every
from aiockpt.coordinator.schedule import by_clock, by_step
from aiockpt.errors import CheckpointError
from aiockpt.protocol.agreeing import Pacer, Pause
from aiockpt.protocol.star import StarMessage

__all__ = ["Pacing"]

_log = logging.getLogger("aiockpt.save")

POLL_SECONDS = 0.5
"""Between two looks for a request to save."""
_LONGEST_REASON = 200
"""Characters; each goes to all ranks."""
_SPEED_SECONDS = 1.0
"""For which the speed of training is measured."""


class Pacing:
    """Where there are several ranks; see ``WhenToSave``. ``due`` gives the same reasons at the same steps on all.

    Steps by arithmetic need no word. Minutes, by rank 0's clock alone, and requests of any rank go to the hub, which
    fixes a step ahead of all; see ``protocol.agreeing``. Only who has accepted a step, and comes to it before the
    verdict, waits in ``due``. What was asked for on one rank is a reason on all of them; with several at once ``due``
    gives them as one text, so look for yours *in* it.

    Args:
        every: As for one rank.
        is_first: Whether this is rank 0.
        say: Sends a message to the hub by way of this rank's worker, or drops it where there is none; quick, called
            from any thread.
        stall_timeout: Seconds that ``due`` may wait for a verdict; None is no limit.
        now: Seconds of the clock that is given to the methods.

    Thread-safety: ``due`` and ``saved`` belong to the training thread, the rest may be called from any.
    """

    def __init__(
        self,
        every: Every | None,
        *,
        is_first: bool,
        say: Callable[[StarMessage], object],
        stall_timeout: float | None,
        now: float,
    ) -> None:
        self._every = every
        self._is_first = is_first
        self._say = say
        self._stall_timeout = stall_timeout
        self._changed = threading.Condition()
        self._pacer = Pacer()
        self._place = _Place()
        self._speed = _Speed()
        self._last_save = now
        # Each request is a new tuple, told from others by what it is and not by its text.
        self._requested: tuple[str] | None = None
        self._asked: tuple[str] | None = None
        self._is_alone = False

    # ---- from the training thread

    def due(self, step: int, now: float) -> str | None:
        """Return why step ``step`` should be saved, or None; waits where that is being agreed on just now."""
        self.poll(now)
        with self._changed:
            place = self._place.of(step)
            self._speed.at(place, now)
            reason = self._agreed(place, step)
        return reason or by_step(self._every, step)

    def _agreed(self, place: int, step: int) -> str | None:
        def is_known() -> bool:
            return self._is_alone or self._pacer.due(place) is not Pause.PAUSE

        if not self._changed.wait_for(is_known, self._stall_timeout):
            _log.warning(
                "due(%d) has waited %g s to hear at which step all ranks save, and goes on: rank 0's worker, or this "
                "rank's, does not answer. What was requested may be saved at different steps on the ranks, and fail",
                step,
                self._stall_timeout,
            )
        reason = self._pacer.due(place)
        if reason is Pause.PAUSE:
            self._pacer.give_up()
            reason = self._pacer.due(place)
        assert not isinstance(reason, Pause), "nothing is held after giving up"
        return reason

    def saved(self, step: int, now: float) -> None:
        """``save`` was called, whatever becomes of it: on all ranks alike, also where one of them skips it."""
        with self._changed:
            self._pacer.saved()
            self._last_save = now

    # ---- from anywhere

    def request(self, reason: str) -> None:
        """Want a save on all ranks: one assignment, safe in a signal handler; ``due`` or ``poll`` passes it on."""
        self._requested = (reason[:_LONGEST_REASON],)

    def poll(self, now: float) -> None:
        """Pass on what this rank wants; called now and then in the loop, for training that does not call ``due``."""
        with self._changed:
            messages = self._wanted(now)
        self._send(messages)

    def _wanted(self, now: float) -> list[StarMessage]:
        requested = self._requested
        if requested is not None and requested is not self._asked:
            self._asked = requested
            return self._pacer.ask(requested[0])
        if not self._is_first or self._pacer.is_expecting:
            return []
        reason = by_clock(self._every, now - self._last_save)
        return [] if reason is None else self._pacer.ask(reason)

    # ---- from the coordinator's loop

    async def run(self) -> None:
        """Pass on what a signal handler asked for, also where training does not call ``due`` for long."""
        while True:
            self.poll(time.monotonic())
            await anyio.sleep(POLL_SECONDS)

    def hear(self, message: StarMessage) -> None:
        """The hub says something about when to save; other messages are none of its business."""
        with self._changed:
            answers = self._pacer.hear(message, lead=math.ceil(self._speed.per_second))
            self._changed.notify_all()
        self._send(answers)

    def rejoined(self) -> None:
        """A new worker of this rank is with the hub: what the former one was told may have died with it."""
        with self._changed:
            self._is_alone = False
            messages = self._pacer.pending()
        self._send(messages)

    def fail(self, error: CheckpointError) -> None:
        """No word of a hub will come, unless this rank is in again: ``due`` waits for none."""
        with self._changed:
            self._is_alone = True
            self._changed.notify_all()

    def _send(self, messages: list[StarMessage]) -> None:
        for message in messages:
            self._say(message)


class _Place:
    """Counts steps on where training goes back to an earlier one, as after a restore: the hub's steps only ever grow.

    All ranks go back alike, so they count alike.
    """

    def __init__(self) -> None:
        self._step = -1
        self._offset = 0

    def of(self, step: int) -> int:
        if step < self._step:
            self._offset += self._step + 1 - step
        self._step = step
        return step + self._offset


class _Speed:
    """Steps per second, over the last second or since the beginning."""

    def __init__(self) -> None:
        self.per_second = 0.0
        self._since: tuple[int, float] | None = None

    def at(self, place: int, now: float) -> None:
        if self._since is None:
            self._since = (place, now)
            return
        steps, seconds = place - self._since[0], now - self._since[1]
        if seconds > 0:
            self.per_second = steps / seconds
        if seconds >= _SPEED_SECONDS:
            self._since = (place, now)
