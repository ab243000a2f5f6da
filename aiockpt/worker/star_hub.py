"""The star of rank 0: the hub with its listener, its members, and what it has done in the run directory."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

import anyio
import anyio.lowlevel

from aiockpt.protocol.agreeing import Agreement
from aiockpt.protocol.frames import encode
from aiockpt.protocol.hub import Hub
from aiockpt.protocol.meeting import Room
from aiockpt.protocol.orders import CheckPlans, Commit, Compare, Drop, Look, MakeAttempt, Order, Output, Tell
from aiockpt.protocol.star import (
    Answer,
    AskSave,
    Attend,
    Ended,
    Join,
    Leave,
    MemberBeat,
    Pace,
    Recall,
    Refused,
    Silent,
    StarMessage,
    Welcome,
)
from aiockpt.protocol.terms import WireError
from aiockpt.worker.star import Party, Ticks
from aiockpt.worker.star_link import HubEnd, StarLink

__all__ = ["Clerk", "StarHub", "make_room"]

_log = logging.getLogger("aiockpt.worker")

BACKLOG = 4096
"""Connections that the kernel may hold before they are accepted: all ranks come at once."""
SPARE_FDS = 256
"""Descriptors that a worker needs beside one for each rank."""
STRANGERS = 64
"""Connections beyond one for each rank that may be open before they have joined; then the oldest goes."""
QUIET_SECONDS = 10.0
"""Between two lines in the log about connections that were dropped: who hammers at the port fills no disk."""
CLOSE_SECONDS = 2.0


class Clerk(Protocol):
    """What the hub has done, one order after another; each ends in bounded time, with an error as a value."""

    async def look(self, order: Look) -> Ended | None:
        """Return how the save ended if its checkpoint stands, else None."""

    async def make(self, order: MakeAttempt) -> WireError | None:
        """Move the attempt before it out of the way, and make the directories of this one."""

    async def check(self, order: CheckPlans) -> tuple[WireError, int | None] | dict[int, list[str]]:
        """Return what does not fit, with the rank to blame if there is one, or who writes undeclared tensors.

        The latter by rank: folders, ranks that write none left out.
        """

    async def compare(self, order: Compare) -> WireError | None:
        """Return what differs between ranks and must not."""

    async def commit(self, order: Commit) -> Ended:
        """Write the manifest, publish, and say how it ended."""

    async def drop(self, order: Drop) -> None:
        """Remove an attempt."""


class StarHub:
    """Serves the star; rank 0 is a member of its own hub, without a socket.

    Args:
        listener_fd: A listening socket; becomes the hub's, other descriptors of it stay.
        world: How many ranks there are.
        token: Of the job.
        package: Version that every member must be of.
        clerk: Carries out what the hub decides.
        party: Rank 0.
        stall_timeout: Seconds of silence after which a member counts as lost; None is no limit.
        arrival_timeout: As the hub takes it.
        return_timeout: As the hub takes it.
        is_first: Whether no hub of this job came before.
        new_id: Makes the id of a save.
    """

    def __init__(
        self,
        listener_fd: int,
        *,
        world: int,
        token: bytes,
        package: str,
        clerk: Clerk,
        party: Party,
        stall_timeout: float | None,
        arrival_timeout: float | None,
        return_timeout: float | None,
        is_first: bool = True,
        new_id: Callable[[], str] = lambda: str(uuid.uuid4()),
    ) -> None:
        self._listener = socket.socket(fileno=listener_fd)
        self._listener.set_inheritable(False)
        self._world = world
        self._token = token
        self._package = package
        self._clerk = clerk
        self._party = party
        self._stall_timeout = stall_timeout
        self._now = 0.0
        """The hub's clock: what its ticks add up to."""
        self._hub = Hub(
            world,
            new_id=new_id,
            arrival_timeout=arrival_timeout,
            return_timeout=return_timeout,
            now=self._now,
            is_first=is_first,
        )
        self._agreement = Agreement(world)
        self._room = Room(world, arrival_timeout=arrival_timeout, is_first=is_first)
        self._epoch = 0
        self._members: dict[int, StarLink] = {}
        self._unjoined: dict[StarLink, None] = {}
        """In the order in which they came."""
        self._links: set[StarLink] = set()
        """All that are not closed yet."""
        self._leaving: set[StarLink] = set()
        """Members that have said that they leave: the end of a job is nothing to tell of."""
        self._all_down = anyio.Event()
        self._orders: deque[Order] = deque()
        self._more = anyio.Event()
        self._is_running = False
        self._members_of: dict[int, str] = {}
        """By rank: the trainer whose worker joined first. Another one is of another job, which found this hub's
        address where it was left."""
        self._complaints = _Complaints()

    async def run(self) -> None:
        """Serve until cancelled; all connections and this descriptor of the listener are closed behind it.

        Raises:
            OSError: The descriptor is no listening socket.
        """
        make_room(self._world + SPARE_FDS)
        loop = asyncio.get_running_loop()
        self._is_running = True
        try:
            server = await loop.create_server(self._accept, sock=self._listener, backlog=BACKLOG)
        except BaseException:
            self._listener.close()
            raise
        try:
            async with anyio.create_task_group() as tasks:
                self._join_here()
                tasks.start_soon(self._work)
                tasks.start_soon(self._watch)
        finally:
            self._is_running = False
            server.close()
            await self._close_links()

    @property
    def joined(self) -> int:
        """How many ranks are in, this one among them."""
        return len(self._members) + self._is_running

    def say(self, message: StarMessage) -> None:
        """Rank 0 says something."""
        if self._is_running:
            self._hear(0, message)

    async def leave(self, why: str) -> None:
        """Tell every member that no hub comes again; what was said before reaches them first."""
        self._is_running = False
        error = WireError(
            kind="peer", what="rank 0 has left", why=why, next="close the Checkpointers of all ranks together", rank=0
        )
        for link in self._members.values():
            link.finish(Refused(error=error), why)
        await self._wait_links()

    # ---- connections

    def _accept(self) -> StarLink:
        return HubEnd(self, self._token)

    def link_made(self, link: StarLink) -> None:
        """Somebody connected."""
        self._links.add(link)
        self._unjoined[link] = None
        if not self._is_running:
            link.drop("the hub ends")
        elif len(self._unjoined) > self._world + STRANGERS:
            next(iter(self._unjoined)).drop("too many came at once")

    def link_up(self, link: StarLink) -> None:
        """Whoever it is knows the token; its Join follows."""

    def link_says(self, link: StarLink, message: StarMessage) -> None:
        """A message came."""
        match message:
            case _ if link.rank is None:
                self._greet(link, message)
            case MemberBeat():
                pass
            case Join():
                link.drop("it joins twice")
            case _:
                if isinstance(message, Leave):
                    self._leaving.add(link)
                self._hear(link.rank, message)

    def link_down(self, link: StarLink, why: str) -> None:
        """A connection is over."""
        has_left = link in self._leaving
        self._leaving.discard(link)
        self._links.discard(link)
        if not self._links:
            self._all_down.set()
        if not self._is_running:
            return
        if link.rank is None:
            self._unjoined.pop(link, None)
            self._complaints.add(f"a connection to rank 0 from {link.peer} did not become a rank: {why}")
        elif self._members.get(link.rank) is link:
            del self._members[link.rank]
            if not has_left:
                _log.info("the worker of rank %d is away: %s", link.rank, why)
            is_silent = self._stall_timeout is not None and link.silence >= self._stall_timeout
            self._lose(link.rank, is_silent=is_silent)

    def _greet(self, link: StarLink, message: StarMessage) -> None:
        if not isinstance(message, Join):
            link.drop("its first message is no Join")
            return
        if (why := self._why_not(message)) is not None:
            link.finish(_refusal(message.rank, why, "start the job again with one version on all ranks"), why)
            return
        if (older := self._members.pop(message.rank, None)) is not None:
            replaced = "another worker of this rank has joined"
            older.finish(_refusal(message.rank, replaced, "look for a second process of this rank"), replaced)
            self._lose(message.rank)
        del self._unjoined[link]
        link.rank = message.rank
        link.settled()
        self._members[message.rank] = link
        self._epoch += 1
        link.send(Welcome(epoch=self._epoch))
        self._take_in(message)

    def _why_not(self, join: Join) -> str | None:
        if join.package != self._package:
            return f"it is of version {join.package!r}, rank 0 of {self._package!r}"
        if join.world != self._world:
            return f"it says that there are {join.world} ranks, rank 0 says {self._world}"
        if not 0 < join.rank < self._world:
            return f"rank {join.rank} is none of the ranks 1 to {self._world - 1} that may come"
        if self._members_of.setdefault(join.rank, join.member) != join.member:
            return f"rank {join.rank} of this job is another process"
        return None

    def _join_here(self) -> None:
        join = self._party.join()
        self._epoch += 1
        self._later(self._party.welcome, self._epoch)
        self._take_in(join)

    async def _close_links(self) -> None:
        for link in self._links:
            link.drop("the hub ends")
        with anyio.CancelScope(shield=True):
            await self._wait_links()
            # The loop closes what it listened on in its next turn.
            await anyio.lowlevel.checkpoint()

    async def _wait_links(self) -> None:
        with anyio.move_on_after(CLOSE_SECONDS):
            if self._links:
                self._all_down = anyio.Event()
                await self._all_down.wait()

    # ---- what the hub decides

    def _take_in(self, join: Join) -> None:
        self._do(self._hub.join(join, self._now))
        self._do(self._agreement.join(join.rank))
        self._room.join(join.rank)

    def _lose(self, rank: int, *, is_silent: bool = False) -> None:
        self._do(self._hub.lost(rank, self._now, is_silent=is_silent))
        self._do(self._agreement.lost(rank))
        self._room.lost(rank)

    def _hear(self, rank: int, message: StarMessage) -> None:
        if isinstance(message, AskSave | Pace | Answer):
            self._do(self._agreement.hear(rank, message))
        elif isinstance(message, Attend | Recall):
            self._do(self._room.hear(rank, message, self._now))
        else:
            self._do(self._hub.hear(rank, message, self._now))
            if isinstance(message, Leave | Silent):
                self._tick_room()

    def _do(self, outputs: Iterable[Output]) -> None:
        for output in outputs:
            if isinstance(output, Tell):
                self._tell(output)
            else:
                self._orders.append(output)
                self._more.set()

    def _tell(self, tell: Tell) -> None:
        frame = encode(tell.message)
        for rank in tell.ranks:
            if rank == 0:
                self._later(self._party.hear, tell.message)
            elif (link := self._members.get(rank)) is not None:
                link.send_frame(frame)

    def _later(self, call: Callable[..., None], *arguments: object) -> None:
        """Tell rank 0 in the next turn of the loop, as if it were behind a socket: it may answer at once."""

        def tell() -> None:
            if self._is_running:
                call(*arguments)

        asyncio.get_running_loop().call_soon(tell)

    async def _work(self) -> None:
        while True:
            while self._orders:
                self._do(await self._carry_out(self._orders.popleft()))
            self._more = anyio.Event()
            await self._more.wait()

    async def _carry_out(self, order: Order) -> list[Output]:
        match order:
            case Look():
                return self._hub.looked(order.n, await self._clerk.look(order))
            case MakeAttempt():
                return self._hub.made(order, await self._clerk.make(order))
            case CheckPlans():
                found = await self._clerk.check(order)
                if isinstance(found, dict):
                    return self._hub.checked(order.n, None, extra=found)
                return self._hub.checked(order.n, *found)
            case Compare():
                return self._hub.compared(order.n, order.attempt, await self._clerk.compare(order))
            case Commit():
                return self._hub.committed(order.n, await self._clerk.commit(order))
            case Drop():
                await self._clerk.drop(order)
                return []

    # ---- time

    async def _watch(self) -> None:
        ticks = Ticks(self._stall_timeout)
        while True:
            deadlines = self._hub.next_deadline(), self._room.next_deadline()
            elapsed = await ticks.next(min((at for at in deadlines if at is not None), default=None))
            self._now = ticks.now
            self._find_silent(elapsed)
            if ticks.is_beat_due():
                self._beat()
            self._do(self._hub.tick(self._now))
            self._tick_room()

    def _tick_room(self) -> None:
        self._do(self._room.tick(self._now, self._hub.gone, self._hub.silent))

    def _find_silent(self, elapsed: float) -> None:
        for link in self._members.values():
            link.silence += elapsed
            if self._stall_timeout is not None and link.silence >= self._stall_timeout:
                link.drop(f"nothing came from it for {self._stall_timeout:g} s")

    def _beat(self) -> None:
        frame = encode(MemberBeat())
        for link in self._members.values():
            link.send_frame(frame)


class _Complaints:
    """Log lines about strangers, few of them."""

    def __init__(self) -> None:
        self._quiet_until = 0.0
        self._unsaid = 0

    def add(self, text: str) -> None:
        now = asyncio.get_running_loop().time()
        if now < self._quiet_until:
            self._unsaid += 1
            return
        _log.warning("%s%s", text, f" (and {self._unsaid} like it before)" if self._unsaid else "")
        self._quiet_until, self._unsaid = now + QUIET_SECONDS, 0


def _refusal(rank: int, why: str, advice: str) -> Refused:
    what = f"rank {rank} was refused by the worker of rank 0"
    return Refused(error=WireError(kind="config", what=what, why=why, next=advice, rank=rank))


def make_room(wanted: int) -> None:
    """Raise the soft limit of descriptors, or say that the hard one is too low: 1,024 broke at 1,100 ranks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        _log.warning("rank 0 may need %d descriptors, and %d is the limit (ulimit -Hn): raise it", wanted, hard)
        wanted = hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
