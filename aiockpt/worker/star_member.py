"""The star of every rank but 0: a connection to the hub, made again whenever it breaks."""

from __future__ import annotations

import asyncio
import logging
import random

import anyio

from aiockpt.protocol.hub import SILENT_RETURN_SECONDS
from aiockpt.protocol.star import Leave, MemberBeat, Refused, StarMessage, Welcome
from aiockpt.protocol.terms import WireError
from aiockpt.worker.star import Party, Ticks
from aiockpt.worker.star_link import MemberEnd, StarLink

__all__ = ["StarMember"]

_log = logging.getLogger("aiockpt.worker")

CONNECT_SECONDS = 5.0
PAUSES = 0.05, 2.0
"""Seconds between two tries: the first, doubled each time, up to the second; each between half and all of it, so that
thousands do not come at once."""
CLOSE_SECONDS = 2.0


class StarMember:
    """Takes part as one member.

    Args:
        address: Of the hub.
        token: Of the job.
        party: Who takes part.
        stall_timeout: Seconds of silence after which the hub counts as lost; None is no limit.
        return_timeout: Seconds without a hub after which the party is told so; None: never.
    """

    def __init__(
        self,
        address: tuple[str, int],
        *,
        token: bytes,
        party: Party,
        stall_timeout: float | None,
        return_timeout: float | None,
    ) -> None:
        self._address = address
        self._token = token
        self._party = party
        self._stall_timeout = stall_timeout
        self._return_timeout = return_timeout
        self._link: StarLink | None = None
        self._down = anyio.Event()
        self._is_joined = False
        self._joins = 0
        self._refused: WireError | None = None
        self._why = ""
        """Why the last connection, or try, came to an end."""
        self._away = 0.0
        """Seconds without a hub, in ticks."""
        self._is_leaving = False
        self._is_told = False
        """Whether the party knows that no hub came for too long."""

    async def run(self) -> None:
        """Take part until cancelled, or refused; the connection is closed behind it."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch)
                await self._stay_connected()
                tasks.cancel_scope.cancel()
        finally:
            if self._link is not None:
                self._link.drop("the member ends")
                with anyio.move_on_after(CLOSE_SECONDS, shield=True):
                    await self._down.wait()
        if self._refused is not None:
            self._party.gone(self._refused)

    @property
    def is_refused(self) -> bool:
        """Whether the hub has said that it does not take this rank, or not any longer: it was there, and is done."""
        return self._refused is not None

    def say(self, message: StarMessage) -> None:
        """Tell the hub; dropped while it is away: the party says it again behind its welcome."""
        if self._is_joined and self._link is not None:
            self._link.send(message)

    async def leave(self, why: str) -> None:
        """Say that this rank takes part no more, and end the connection behind that; then ``run`` returns."""
        self._is_leaving = True
        if self._is_joined and self._link is not None:
            self._link.finish(Leave(why=why), "the member leaves")
            with anyio.move_on_after(CLOSE_SECONDS):
                await self._down.wait()

    # ---- the connection

    async def _stay_connected(self) -> None:
        pause, most = PAUSES
        while True:
            joins = self._joins
            if await self._connect():
                await self._down.wait()
            if self._refused is not None or self._is_leaving:
                return
            if self._joins > joins:
                pause = PAUSES[0]
            await anyio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, most)

    async def _connect(self) -> bool:
        link = MemberEnd(self, self._token)
        self._down = anyio.Event()
        host, port = self._address
        is_connected = False
        try:
            with anyio.fail_after(CONNECT_SECONDS):
                await asyncio.get_running_loop().create_connection(lambda: link, host, port)
            is_connected = True
        except TimeoutError:
            self._why = f"no connection within {CONNECT_SECONDS:g} s"
        except OSError as exc:
            self._why = exc.strerror or str(exc)
        finally:
            if not is_connected:  # also where we are cancelled: it may stand already, and its end would not be told
                self._link = None
                link.drop(self._why)
        return is_connected

    def link_made(self, link: StarLink) -> None:
        """The connection stands."""
        self._link = link

    def link_up(self, link: StarLink) -> None:
        """The hub has proved itself."""
        link.send(self._party.join())

    def link_says(self, link: StarLink, message: StarMessage) -> None:
        """The hub says something."""
        match message:
            case Welcome(epoch=epoch):
                link.settled()
                self._is_joined, self._away, self._is_told = True, 0.0, False
                self._joins += 1
                self._party.welcome(epoch)
            case Refused(error=error):
                self._refused = error
                link.drop(error.why)
            case MemberBeat():
                pass
            case _ if self._is_joined:
                self._party.hear(message)
            case _:
                link.drop("it speaks before its welcome")

    def link_down(self, link: StarLink, why: str) -> None:
        """The connection is over."""
        if link is not self._link:
            return
        self._link, self._why = None, why
        is_silent = self._stall_timeout is not None and link.silence >= self._stall_timeout
        if is_silent and self._return_timeout is not None:  # see ``Hub.lost``
            self._away = max(0.0, self._return_timeout - SILENT_RETURN_SECONDS)
        if self._is_joined:
            self._is_joined = False
            if self._refused is None and not self._is_leaving:
                _log.info("the hub at %s:%d is away: %s", *self._address, why)
                self._party.lost(why)
        self._down.set()

    # ---- time

    async def _watch(self) -> None:
        ticks = Ticks(self._stall_timeout)
        while True:
            elapsed = await ticks.next()
            if not self._is_joined or self._link is None:
                self._count_absence(elapsed)
                continue
            if ticks.is_beat_due():
                self._link.send(MemberBeat())
            self._link.silence += elapsed
            if self._stall_timeout is not None and self._link.silence >= self._stall_timeout:
                self._link.drop(f"nothing came from it for {self._stall_timeout:g} s")

    def _count_absence(self, elapsed: float) -> None:
        self._away += elapsed
        if self._return_timeout is None or self._away < self._return_timeout or self._is_told:
            return
        self._is_told = True
        host, port = self._address
        self._party.gone(
            WireError(
                kind="peer",
                what=f"the worker of rank 0 was not reached at {host}:{port} in time",
                why=self._why,
                next="look at rank 0 and at the network between; saves work again once it is back",
                rank=0,
            )
        )
