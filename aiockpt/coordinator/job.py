"""This rank's part in a job of several: how it finds the others, what it tells the hub, and what it hears."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import uuid
from collections import deque
from collections.abc import Callable
from typing import Protocol

import anyio
import anyio.to_thread

from aiockpt import __version__
from aiockpt.config import Options
from aiockpt.coordinator import failures
from aiockpt.coordinator.farewell import Farewell
from aiockpt.coordinator.held_run import HeldRun
from aiockpt.coordinator.listener import listen
from aiockpt.coordinator.loop_thread import LoopThread
from aiockpt.coordinator.rendezvous import Group, Meeting, Refusal, Rendezvous
from aiockpt.errors import CheckpointError
from aiockpt.protocol.messages import Enlist, Enlisted, FromHub, NoHub, ToHub, TrainerBeat
from aiockpt.protocol.star import Arguments, Arrive, Credit, End, EndedCall, Join, StarMessage
from aiockpt.state.ranks import Ranks
from aiockpt.storage.claim import RunClaim
from aiockpt.storage.faults import NO_FAULTS, FaultPoint, Faults
from aiockpt.storage.followed_run import FollowedRun
from aiockpt.worker.link import Link

__all__ = ["Job"]

_log = logging.getLogger("aiockpt.coordinator")

REMEMBERED_CALLS = 64
"""That the next worker, and through it the next hub, is told of."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 0.5
"""Seconds between two looks for rank 0."""
CHECK_SECONDS = 60.0
"""What a client of NFS may remember of a name that is not there."""
REFUSAL_SECONDS = 2.0
"""For rank 0 of a job that was started again to replace what its predecessor had to say."""
FAREWELL_SECONDS = 10.0
"""For the hub to be there, and to hear why a rank is not."""


class _ReplacedError(Exception):
    """Rank 0 has published something else."""


class Subscriber(Protocol):
    """Who hears what the hub says to trainers; called in the loop."""

    def hear(self, message: StarMessage) -> None:
        """The hub says something."""

    def rejoined(self) -> None:
        """This rank is in, perhaps again: what was asked and not answered is to be said again."""

    def fail(self, error: CheckpointError) -> None:
        """There is no hub, and who waits for it waits for nothing."""


class Job:
    """Lives in the coordinator's loop; ``say``, ``refuse``, ``next_call`` and ``check`` are for any thread.

    Args:
        options: Of the Checkpointer.
        group: The ranks, and their store.
        loop: The coordinator's.
        faults: Fault layer.
    """

    def __init__(self, options: Options, group: Group, loop: LoopThread, faults: Faults = NO_FAULTS) -> None:
        self.ranks = Ranks(group.rank, group.world, group.members)
        self._options = options
        self._group = group
        self._rendezvous = Rendezvous(group, options.run)
        self._loop = loop
        self._faults = faults
        self._member = uuid.uuid4().hex
        self._found: Meeting | None = None
        self._seen: Meeting | None = None
        """As ``_found``, before the run directory was checked."""
        self._listener: socket.socket | None = None
        self._link: Link | None = None
        self._hubs = 0
        """How many workers of rank 0 were told to be the hub."""
        self._is_in = anyio.Event()
        self._refused = False
        self._failure: CheckpointError | None = None
        self._has_left: anyio.Event | None = None
        self._calls = 0
        self._ended: deque[EndedCall] = deque(maxlen=REMEMBERED_CALLS)
        self._said: deque[Arrive] = deque(maxlen=REMEMBERED_CALLS)
        """Calls that have no save: they raised, or were skipped."""
        self._slot_of: int | None = None
        self.subscribers: list[Subscriber] = []

    # ---- from the threads of the program

    @property
    def was_in(self) -> bool:
        """Whether a hub has ever taken in a worker of this rank."""
        return self._is_in.is_set()

    @property
    def hopeless(self) -> CheckpointError | None:
        """Why this rank has never been in, and will not be; None where it was, or may be."""
        return None if self._is_in.is_set() else self._failure

    def check(self) -> None:
        """Refuse what needs the other ranks while they cannot be reached.

        Raises:
            CheckpointError: Why not.
        """
        if self._failure is not None:
            raise self._failure.copy()

    def next_call(self) -> int:
        """Return the number of this call of ``save``: the same on all ranks for the same call."""
        n, self._calls = self._calls, self._calls + 1
        return n

    def take_back_call(self) -> None:
        """The call does not count: it was not meant for all ranks."""
        self._calls -= 1

    def say(self, message: StarMessage) -> None:
        """Tell the hub; dropped where there is none, see ``Subscriber.rejoined``."""
        self._loop.post(self._send, message)

    def refuse(self, n: int, arguments: Arguments, error: CheckpointError) -> None:
        """The call raised on this rank, so it fails on all."""
        arrive = Arrive(n=n, arguments=arguments, refused=failures.as_data(error, phase="save"))
        self._loop.post(self._say_call, arrive)

    def skip(self, n: int, arguments: Arguments) -> None:
        """The call finds this rank busy, so no rank saves: it has no slot, and the hub knows."""
        self._loop.post(self._say_call, Arrive(n=n, arguments=arguments, is_busy=True))

    # ---- finding each other

    async def form(self, run: HeldRun, on_wait: Callable[[str], None]) -> None:
        """Find the others, behind ``open``, and get this rank's worker in; what fails is told by ``check``.

        Args:
            run: On rank 0 the claim; elsewhere it gets the run's id and term once these are known.
            on_wait: Called now and then while the run directory is looked at; what it raises ends that.
        """
        try:
            if isinstance(run, RunClaim):
                meet = await anyio.to_thread.run_sync(run.make_meet)
                self._listener = await anyio.to_thread.run_sync(listen, self._group.store)
                host, port = self._listener.getsockname()[:2]
                self._found = Meeting(
                    host=host,
                    port=port,
                    token=os.urandom(32).hex(),
                    run_id=run.run_id,
                    term=run.term,
                    meet=meet,
                    package=__version__,
                )
                await anyio.to_thread.run_sync(self._rendezvous.publish, self._found)
                self._enlist()
            else:
                await self._find(run, on_wait)
        except CheckpointError as exc:
            self.fail(exc)
            if self.ranks.rank:
                await self._say_farewell(exc)

    async def publish_failure(self, error: CheckpointError) -> None:
        """Rank 0 could not take the run: let every rank know the cause."""
        try:
            await anyio.to_thread.run_sync(self._rendezvous.publish, Refusal.of(error))
        except CheckpointError as exc:
            _log.warning("the other ranks were not told that this one did not open the run\n%s", exc)

    async def _find(self, run: HeldRun, on_wait: Callable[[str], None]) -> None:
        """Look until a hub has taken this rank in: on a store that survived, a former job's words stand there first."""
        pause = FIRST_PAUSE
        began = anyio.current_time()
        why = "rank 0 has not opened the run"
        refused_until: float | None = None
        with anyio.move_on_after(self._options.start_timeout):
            while True:
                found = await anyio.to_thread.run_sync(self._rendezvous.look)
                if isinstance(found, Refusal):
                    refused_until = refused_until or anyio.current_time() + REFUSAL_SECONDS
                    if anyio.current_time() >= refused_until:
                        raise found.as_exception()
                elif found is not None and (found != self._found or self._refused):
                    self._seen = found
                    seconds = self._check_seconds(anyio.current_time() - began)
                    if await self._is_of_ours(found, run, seconds, on_wait):
                        self._found, self._refused = found, False
                        self._enlist()
                        why = f"rank 0 was found at {found.host}:{found.port}, and does not take this rank in"
                with anyio.move_on_after(pause):
                    await self._is_in.wait()
                    self._rendezvous.close()  # nothing needs the store any more
                    return
                pause = min(2 * pause, LONGEST_PAUSE)
        raise failures.no_rank_0(why, self._options.start_timeout)

    def _check_seconds(self, spent: float) -> float:
        """Return how long the run directory may take to look as rank 0 has it."""
        timeout = self._options.start_timeout
        return CHECK_SECONDS if timeout is None else min(CHECK_SECONDS, max(0.0, timeout - spent))

    async def _is_of_ours(self, found: Meeting, run: HeldRun, seconds: float, on_wait: Callable[[str], None]) -> bool:
        """Check the run directory against what rank 0 says of it, unless rank 0 says something else meanwhile."""

        def look_again(what: str) -> None:
            on_wait(what)
            if self._rendezvous.look() != found:
                raise _ReplacedError

        def check() -> FollowedRun:
            return FollowedRun.check(
                run.run, run_id=found.run_id, term=found.term, meet=found.meet, timeout=seconds, on_wait=look_again
            )

        try:
            checked = await anyio.to_thread.run_sync(check)
        except _ReplacedError:
            return False
        run.run_id, run.term = checked.run_id, checked.term
        return True

    def _enlist(self) -> None:
        """Tell the worker where the star is; it may not be up yet."""
        found, link = self._found, self._link
        if found is None or link is None:
            return
        self._faults.at(FaultPoint.TRAINER_ENLISTING)
        options = self._options
        listener = None if self._listener is None else os.dup(self._listener.fileno())
        link.send(
            Enlist(
                rank=self.ranks.rank,
                world=self.ranks.world,
                member=self._member,
                host=found.host,
                port=found.port,
                token=bytes.fromhex(found.token),
                is_first=self._hubs == 0,
                stall_timeout=options.stall_timeout,
                arrival_timeout=options.arrival_timeout,
                return_timeout=options.start_timeout,
                ended_calls=list(self._ended),
                slot_of=self._slot_of,
                fds=0 if listener is None else 1,
            ),
            listener,
        )
        self._hubs += 1

    # ---- the worker

    async def beat(self, interval: float) -> None:
        """Show the worker every ``interval`` seconds that this process runs, however long the program computes."""
        while True:
            await anyio.sleep(interval)
            if self._link is not None and self._link.is_idle:  # else the worker does not read, and counts nothing
                self._link.send(TrainerBeat())

    def worker_up(self, link: Link) -> None:
        """A worker of this rank is there: behind what it hears of open saves it is told of the star."""
        self._link = link
        self._enlist()

    def worker_down(self) -> None:
        """It is gone."""
        self._link = None

    def worker_says(self, message: Enlisted | NoHub | FromHub) -> None:
        """Take what it says of the star."""
        match message:
            case Enlisted():
                self._is_in.set()
                self._failure = None
                for arrive in self._said:
                    self._send(arrive)
                for subscriber in self.subscribers:
                    subscriber.rejoined()
            case NoHub(error=error):
                if self._is_in.is_set():
                    self.fail(failures.peer_failed(error, "the other ranks are not reached", rank=error.rank))
                else:
                    self._refused = True
                    _log.info("rank 0 is looked for again: %s", error.why)
            case FromHub(message=said):
                for subscriber in self.subscribers:
                    subscriber.hear(said)

    def fail(self, error: CheckpointError) -> None:
        """The other ranks cannot be reached; if that ends, ``Enlisted`` says so."""
        self._failure = error
        _log.info("%s", error)  # whoever needs the other ranks gets it raised
        for subscriber in self.subscribers:
            subscriber.fail(error)

    async def give_up(self, error: CheckpointError) -> None:
        """This rank will have no worker any more: the others are to know at once, and why."""
        self._has_left = anyio.Event()
        try:
            self.fail(error)
            if self.ranks.rank:
                await self._say_farewell(error)
            else:
                if not self._is_in.is_set():
                    await self.publish_failure(error)
                self.close()
        finally:
            self._has_left.set()

    async def wait_left(self) -> None:
        """Wait until the others know, where this rank has given up; bounded."""
        if self._has_left is not None:
            await self._has_left.wait()

    async def _say_farewell(self, error: CheckpointError) -> None:
        with anyio.move_on_after(FAREWELL_SECONDS), contextlib.suppress(CheckpointError):  # the store may be gone, too
            while self._seen is None:
                found = await anyio.to_thread.run_sync(self._rendezvous.look)
                if isinstance(found, Refusal):
                    return
                self._seen = found
                await anyio.sleep(FIRST_PAUSE)
            join = self._join(f"{error.what}: {error.why}")
            token = bytes.fromhex(self._seen.token)
            await Farewell((self._seen.host, self._seen.port), token, join, patience=FAREWELL_SECONDS).run()

    def closing(self) -> None:
        """Nobody waits for the others any more, but for what is being saved."""
        for subscriber in self.subscribers:
            subscriber.fail(failures.closed())

    def close(self) -> None:
        """Let the listener and the store go."""
        self._rendezvous.close()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def forget_in_child(self) -> None:
        """In a forked child: who holds the listener on lets connections wait for nobody."""
        if self._listener is not None:
            os.close(self._listener.detach())

    # ---- saves

    def began(self, n: int) -> None:
        """A save has this rank's slot."""
        self._slot_of = n

    def freed(self, n: int) -> None:
        """The slot is free again, and this rank knows it: the hub may count on it."""
        if self._slot_of == n:
            self._slot_of = None
        self._send(Credit(n=n))

    def ended(self, n: int, end: End) -> None:
        """A save has its outcome on this rank."""
        self._ended.append(EndedCall(n=n, end=end))

    # ---- inside

    def _say_call(self, arrive: Arrive) -> None:
        self._said.append(arrive)
        self._send(arrive)

    def _send(self, message: StarMessage) -> None:
        if self._link is not None and self._is_in.is_set():
            self._link.send(ToHub(message=message))

    def _join(self, why: str) -> Join:
        return Join(
            rank=self.ranks.rank,
            world=self.ranks.world,
            package=__version__,
            member=self._member,
            ended_calls=list(self._ended),
            slot_of=self._slot_of,
            why=why,
        )
