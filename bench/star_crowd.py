"""The members of a star, thousands in one process: the real connections, and nothing behind them."""

from __future__ import annotations

import asyncio
import time

import anyio

from aiockpt.format.manifest import FileRecord
from aiockpt.protocol.frames import encode
from aiockpt.protocol.star import Body, Ended, Join, MemberBeat, Open, StarMessage, WantBody, Welcome
from aiockpt.worker.star_link import MemberEnd, StarLink
from bench.star_process import PACKAGE, PLAN_NBYTES, TOKEN, arrival, written

__all__ = ["Crowd"]

_AT_ONCE = 256
"""Connections that are being made at one time."""
_PATIENCE_SECONDS = 120.0


class Crowd:
    """All ranks but 0.

    Args:
        world: With rank 0.
        port: Of the hub.
    """

    def __init__(self, world: int, port: int) -> None:
        self._world = world
        self._port = port
        self._links: dict[StarLink, int] = {}
        self._welcomed: list[StarLink] = []
        self._counts = {Welcome: 0, Open: 0, Ended: 0}
        self._all_said = anyio.Event()
        self._awaited: type[StarMessage] = Welcome
        self.beats = 0
        """That came from the hub."""

    async def join(self) -> float:
        """Connect all, and return how many seconds it took until all are in."""
        begun = time.monotonic()
        limit = anyio.CapacityLimiter(_AT_ONCE)
        with anyio.fail_after(_PATIENCE_SECONDS):
            async with anyio.create_task_group() as tasks:
                for rank in range(1, self._world):
                    tasks.start_soon(self._connect, rank, limit)
            await self._all(Welcome)
        return time.monotonic() - begun

    async def arrive(self, n: int) -> tuple[float, float]:
        """Say that all ranks have called ``save``; return when the first did, and when all knew the decision."""
        return await self._say([encode(arrival(n))] * (self._world - 1), Open)

    async def write(self, n: int) -> tuple[float, float]:
        """Say that all ranks have written; return when the first did, and when all knew the outcome."""
        frames = [encode(written(n, _files(rank, self._world))) for rank in range(1, self._world)]
        return await self._say(frames, Ended)

    def beat(self) -> None:
        """Each member says that it lives."""
        frame = encode(MemberBeat())
        for link in self._links:
            link.send_frame(frame)

    async def leave(self) -> None:
        """Close all."""
        for link in list(self._links):
            link.drop("it was measured")
        with anyio.move_on_after(5):
            while self._links:  # noqa: ASYNC110 -- nothing is measured any more
                await anyio.sleep(0.01)

    async def _connect(self, rank: int, limit: anyio.CapacityLimiter) -> None:
        async with limit:
            link = MemberEnd(self, TOKEN)
            self._links[link] = rank
            await asyncio.get_running_loop().create_connection(lambda: link, "127.0.0.1", self._port)

    async def _say(self, frames: list[bytes], answer: type[StarMessage]) -> tuple[float, float]:
        self._counts[answer] = 0
        begun = time.monotonic()
        for link, frame in zip(self._links, frames, strict=True):
            link.send_frame(frame)
        with anyio.fail_after(_PATIENCE_SECONDS):
            await self._all(answer)
        return begun, time.monotonic()

    async def _all(self, kind: type[StarMessage]) -> None:
        self._awaited = kind
        self._all_said = anyio.Event()
        if self._counts[kind] < self._world - 1:
            await self._all_said.wait()

    # ---- what the connections call

    def link_made(self, link: StarLink) -> None:
        """It stands."""

    def link_up(self, link: StarLink) -> None:
        """It is proved."""
        link.send(Join(rank=self._links[link], world=self._world, package=PACKAGE))

    def link_says(self, link: StarLink, message: StarMessage) -> None:
        """Count what comes."""
        match message:
            case WantBody():
                link.send(Body(digest=message.digest, body=bytes(PLAN_NBYTES)))
            case MemberBeat():
                self.beats += 1
            case Welcome() | Open() | Ended():
                assert not isinstance(message, Ended) or message.error is None, message
                if isinstance(message, Welcome):
                    link.settled()
                kind = type(message)
                self._counts[kind] += 1
                if kind is self._awaited and self._counts[kind] == self._world - 1:
                    self._all_said.set()

    def link_down(self, link: StarLink, why: str) -> None:
        """It is gone."""
        del self._links[link]


def _files(rank: int, world: int) -> list[FileRecord]:
    """Return what a rank wrote: a part of the model, one of the optimizer."""
    return [
        FileRecord(
            path=f"{folder}/model-{rank + 1:05}-of-{world:05}.safetensors",
            nbytes=1 << 30,
            data_start=1 << 20,
            sum="0" * 32,
            rank=rank,
        )
        for folder in ("model", "optimizer")
    ]
