"""Whether the trainer still speaks: a process that is stopped is no dead one, and nothing but its silence tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import anyio

from aiockpt.worker.star import Ticks

__all__ = ["TrainerWatch"]


class Listener(Protocol):
    """Who is told; called in the loop."""

    def trainer_is_silent(self, seconds: float) -> None:
        """Nothing came from it for so long."""

    def trainer_is_heard(self) -> None:
        """It is there again."""


class TrainerWatch:
    """Counts silence in ticks, so that a worker that was itself stopped accuses nobody.

    Args:
        stall_timeout: Seconds without a word after which the trainer counts as stopped; None is no limit.
        listener: Is told when that is so, and when it is no longer.
        has_unread: Whether something came from the trainer that nobody has read yet.
    """

    def __init__(self, stall_timeout: float | None, listener: Listener, has_unread: Callable[[], bool]) -> None:
        self._stall_timeout = stall_timeout
        self._listener = listener
        self._has_unread = has_unread
        self._silence = 0.0
        self._is_silent = False
        self._watching = anyio.CancelScope()

    def heard(self) -> None:
        """Something came from the trainer; to be called before that is handled."""
        self._silence = 0.0
        if self._is_silent:
            self._is_silent = False
            self._listener.trainer_is_heard()

    def end(self) -> None:
        """Expect nothing from it any more."""
        self._watching.cancel()

    async def run(self) -> None:
        """Watch until ``end``."""
        if self._stall_timeout is None:
            return
        with self._watching:
            ticks = Ticks(self._stall_timeout)
            while True:
                elapsed = await ticks.next()
                self._silence += elapsed
                is_over = self._silence >= self._stall_timeout and not self._has_unread()
                if is_over and not self._is_silent:
                    self._is_silent = True
                    self._listener.trainer_is_silent(self._stall_timeout)
