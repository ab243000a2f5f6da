"""The hub's room in a thread of its own, and the meetings of all ranks of a job in this process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

from aiockpt.coordinator.meetings import Meetings
from aiockpt.protocol.meeting import Room
from aiockpt.protocol.orders import Tell
from aiockpt.protocol.star import Met, StarMessage
from tests.support import PATIENCE_SECONDS

ARRIVAL_TIMEOUT = 600.0


class MeetingHub:
    """What is said goes through one queue, as it would through workers and sockets."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.said: list[tuple[int, StarMessage]] = []
        self.meetings = [Meetings(rank, world, partial(self._say, rank)) for rank in range(world)]
        self._room = Room(world, arrival_timeout=ARRIVAL_TIMEOUT)
        self._now = 0.0
        self._gone: dict[int, str] = {}
        self._away: set[int] = set()
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._moved = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="test-hub", daemon=True)
        for rank in range(world):
            self.join(rank)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._calls.put(None)
        self._thread.join(PATIENCE_SECONDS)

    # ---- what happens to a job

    def join(self, rank: int) -> None:
        """A worker of the rank is welcome."""
        self._calls.put(partial(self._join, rank))

    def lose(self, rank: int) -> None:
        """Its worker dies; nothing that the rank says arrives until it joins."""
        self._calls.put(partial(self._lose, rank))

    def give_up(self, rank: int, why: str) -> None:
        """The rank takes part in nothing any more."""
        self._calls.put(partial(self._give_up, rank, why))

    def pass_time(self, seconds: float) -> None:
        """Let the hub's clock go on."""
        self._calls.put(partial(self._pass_time, seconds))

    def replace(self) -> None:
        """The hub dies, and another one is there; all join it."""
        self._calls.put(self._replace)

    def wait_said(self, count: int) -> None:
        """Wait until so many messages have come to the hub."""
        with self._moved:
            assert self._moved.wait_for(lambda: len(self.said) >= count, PATIENCE_SECONDS)

    # ---- in the thread

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            with self._moved:
                self._moved.notify_all()

    def _say(self, rank: int, message: StarMessage) -> None:
        self._calls.put(partial(self._hear, rank, message))

    def _hear(self, rank: int, message: StarMessage) -> None:
        if rank not in self._away:
            self.said.append((rank, message))
            self._tell(self._room.hear(rank, message, self._now))  # type: ignore[arg-type]

    def _tell(self, tells: list[Tell]) -> None:
        for tell in tells:
            for rank in tell.ranks:
                assert isinstance(tell.message, Met)
                self.meetings[rank].hear(tell.message)

    def _join(self, rank: int) -> None:
        self._away.discard(rank)
        self._room.join(rank)
        self.meetings[rank].rejoined()

    def _lose(self, rank: int) -> None:
        self._away.add(rank)
        self._room.lost(rank)

    def _give_up(self, rank: int, why: str) -> None:
        self._gone[rank] = why
        self._pass_time(0.0)

    def _pass_time(self, seconds: float) -> None:
        self._now += seconds
        self._tell(self._room.tick(self._now, self._gone, {}))

    def _replace(self) -> None:
        self._room = Room(self.world, arrival_timeout=ARRIVAL_TIMEOUT, is_first=False)
        for rank in range(self.world):
            self._join(rank)
