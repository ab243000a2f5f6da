"""When to save, pure: what ``due()`` answers where one rank is alone, and what that is for any number of them."""

from __future__ import annotations

from typing import Protocol

from aiockpt.config import Every

__all__ = ["Schedule", "WhenToSave", "by_clock", "by_step"]


class WhenToSave(Protocol):
    """Gathers reasons to save until a save begins. Times are seconds of one monotonic clock.

    A reason is given until a save is called after it, so that a loop may leave by what it was told. What comes between
    ``due`` and ``save`` is not served by that save: ``due`` gives it afterwards.
    """

    def due(self, step: int, now: float) -> str | None:
        """Return why step ``step`` should be saved, or None; in the training thread."""

    def request(self, reason: str) -> None:
        """Make ``due`` answer ``reason`` until a save begins; one assignment, so it is safe in a signal handler."""

    def saved(self, step: int, now: float) -> None:
        """A save of this step begins; in the training thread."""


def by_step(every: Every | None, step: int) -> str | None:
    """Return a reason by arithmetic alone, or None."""
    if every is not None and every.steps is not None and (step + 1) % every.steps == 0:
        return f"every {every.steps} steps"
    return None


def by_clock(every: Every | None, seconds: float) -> str | None:
    """Return a reason by the time since the last save began, or None."""
    if every is not None and every.minutes is not None and seconds >= every.minutes * 60:
        return f"every {every.minutes:g} minutes"
    return None


class Schedule:
    """Where one rank is alone; see ``WhenToSave``."""

    def __init__(self, every: Every | None, now: float) -> None:
        self._every = every
        self._last_save = now
        # Each request is a new tuple, told from others by what it is and not by its text.
        self._requested: tuple[str] | None = None
        self._answered: tuple[str] | None = None
        self._served: tuple[str] | None = None

    @property
    def requested(self) -> str | None:
        """What was asked for last."""
        return None if self._requested is None else self._requested[0]

    def request(self, reason: str) -> None:
        """Make ``due`` answer ``reason`` until a save begins."""
        self._requested = (reason,)

    def saved(self, step: int, now: float) -> None:
        """A save begins: the request that ``due`` has answered is served."""
        self._served = self._answered
        self._last_save = now

    def due(self, step: int, now: float) -> str | None:
        """Return why step ``step`` should be saved, or None."""
        requested = self._requested
        if requested is not None and requested is not self._served:
            self._answered = requested
            return requested[0]
        return by_step(self._every, step) or by_clock(self._every, now - self._last_save)
