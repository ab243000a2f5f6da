"""What both ends of the star have in common: who takes part, how it is spoken to, and how time is counted."""

from __future__ import annotations

import asyncio
from typing import Protocol

import anyio

from aiockpt.protocol.star import Join, StarMessage
from aiockpt.protocol.terms import WireError

__all__ = ["Party", "Star", "Ticks"]

_TICK_SECONDS = 0.5
_BEAT_SECONDS = 10.0
_BEATS = 6
"""In the time after which silence counts as death; as many ticks at least."""


class Party(Protocol):
    """This rank as the star sees it; every method is called in the loop and returns at once."""

    def join(self) -> Join:
        """Say who joins, and what it knows of before."""

    def welcome(self, epoch: int) -> None:
        """This rank is in: what it had said of its open save is to be said again, by ``Star.say``."""

    def hear(self, message: StarMessage) -> None:
        """The hub says something."""

    def lost(self, why: str) -> None:
        """The hub is away; another one may come."""

    def gone(self, error: WireError) -> None:
        """No hub came for too long, or the hub refuses this rank. After the first a hub may still come."""


class Star(Protocol):
    """Either end."""

    async def run(self) -> None:
        """Take part until cancelled, or refused; everything is closed behind it."""

    def say(self, message: StarMessage) -> None:
        """Tell the hub; dropped while it is away. Nothing may be said before ``welcome``."""

    async def leave(self, why: str) -> None:
        """Take part no more; what was said before reaches the other end first. That of rank 0 ends the star."""


class Ticks:
    """A clock that does not run while this process is stopped: one turn of the loop counts as two pauses at most.

    Whoever wakes up after a minute has one short turn on the clock, reads what waits, and takes nobody for dead.

    Args:
        stall_timeout: Seconds of silence after which the other end counts as lost; None is no limit.
    """

    def __init__(self, stall_timeout: float | None) -> None:
        share = _BEAT_SECONDS if stall_timeout is None else stall_timeout / _BEATS
        self.now = 0.0
        self._pause = min(_TICK_SECONDS, share)
        self._beat = min(_BEAT_SECONDS, share)
        self._beaten = 0.0
        self._before = asyncio.get_running_loop().time()

    async def next(self, deadline: float | None = None) -> float:
        """Wait for the next tick, sooner where ``deadline`` is, and return how long it counts."""
        pause = self._pause if deadline is None else min(self._pause, max(0.001, deadline - self.now))
        await anyio.sleep(pause)
        before, self._before = self._before, asyncio.get_running_loop().time()
        elapsed = min(self._before - before, 2 * self._pause)
        self.now += elapsed
        return elapsed

    def is_beat_due(self) -> bool:
        """Tell whether it is time to say that we live; then the next one is due a beat later."""
        if self.now - self._beaten < self._beat:
            return False
        self._beaten = self.now
        return True
