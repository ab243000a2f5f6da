"""When to save, pure: what ``due()`` answers."""

from __future__ import annotations

from aiockpt.config import Every

__all__ = ["Schedule"]


class Schedule:
    """Gathers reasons to save until a save begins. Times are seconds of one monotonic clock.

    ``request`` is one assignment, so it is safe in a signal handler.
    """

    def __init__(self, every: Every | None, now: float) -> None:
        self._every = every
        self._last_save = now
        self._requested: str | None = None

    def request(self, reason: str) -> None:
        """Make ``due`` answer ``reason`` until a save begins."""
        self._requested = reason

    def saved(self, now: float) -> None:
        """A save begins: what was asked for so far is served."""
        self._requested = None
        self._last_save = now

    def due(self, step: int, now: float) -> str | None:
        """Return why step ``step`` should be saved, or None."""
        if self._requested is not None:
            return self._requested
        every = self._every
        if every is None:
            return None
        if every.steps is not None and (step + 1) % every.steps == 0:
            return f"every {every.steps} steps"
        if every.minutes is not None and now - self._last_save >= every.minutes * 60:
            return f"every {every.minutes:g} minutes"
        return None
