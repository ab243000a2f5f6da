"""This rank on the star: what the hub says goes to the save that it is about, or on to the trainer."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable

from aiockpt import __version__
from aiockpt.protocol import disagreements
from aiockpt.protocol.messages import BeginSave, Enlist, Enlisted, FromHub, Message, NoHub
from aiockpt.protocol.star import (
    Body,
    Committing,
    Credit,
    Ended,
    EndedCall,
    Fits,
    Join,
    Open,
    Silent,
    StarMessage,
    WantBody,
    WantDetails,
)
from aiockpt.protocol.terms import WireError
from aiockpt.storage.faults import FaultPoint
from aiockpt.worker.clerk import RunClerk
from aiockpt.worker.rank_save import RankSave
from aiockpt.worker.save import Surroundings
from aiockpt.worker.star import Star
from aiockpt.worker.star_hub import StarHub
from aiockpt.worker.star_member import StarMember

__all__ = ["Membership"]

_log = logging.getLogger("aiockpt.worker")

_TOLD_ENDS = 64
"""Outcomes that a join tells, as ``star.Join`` says."""


class Membership:
    """The ``star.Party`` of a worker, for one ``Enlist``.

    Args:
        enlist: What the trainer said.
        listener_fd: On rank 0; becomes the hub's.
        saves: Those that are open now.
        send: To the trainer.
        surroundings: Of the worker.
    """

    def __init__(
        self,
        enlist: Enlist,
        listener_fd: int,
        *,
        saves: Callable[[], Iterable[RankSave]],
        send: Callable[[Message], None],
        surroundings: Surroundings,
    ) -> None:
        self._enlist = enlist
        self._saves = saves
        self._send = send
        self._ends: deque[EndedCall] = deque(enlist.ended_calls, _TOLD_ENDS)
        self._slot_of = enlist.slot_of
        self._last_step = next((save.begin.step for save in saves()), None)
        """Of the save that the trainer began last."""
        self._silent: WireError | None = None
        """What the others are told of the trainer while it is not heard."""
        self._is_in = False
        self.was_in = False
        """Whether a hub has ever heard of this worker."""
        self._gone: WireError | None = None
        """Why no hub is waited for any more."""
        self._faults = surroundings.faults
        self._star = self._make_star(listener_fd, surroundings)

    def _make_star(self, listener_fd: int, surroundings: Surroundings) -> Star:
        enlist = self._enlist
        if enlist.rank:
            return StarMember(
                (enlist.host, enlist.port),
                token=enlist.token,
                party=self,
                stall_timeout=enlist.stall_timeout,
                return_timeout=enlist.return_timeout,
            )
        return StarHub(
            listener_fd,
            world=enlist.world,
            token=enlist.token,
            package=__version__,
            clerk=RunClerk(surroundings, world=enlist.world, begin_of=self._begin_of),
            party=self,
            stall_timeout=enlist.stall_timeout,
            arrival_timeout=enlist.arrival_timeout,
            return_timeout=enlist.return_timeout,
            is_first=enlist.is_first,
        )

    async def run(self) -> None:
        """Take part until cancelled, or refused."""
        await self._star.run()

    async def leave(self, why: str) -> None:
        """Say that this rank takes part in nothing any more; on rank 0 that is the end of the star."""
        await self._star.leave(why)

    # ---- to the hub

    def say(self, message: StarMessage) -> None:
        """Tell the hub; dropped while this rank is not in."""
        if isinstance(message, Credit) and self._slot_of == message.n:
            self._slot_of = None
        if self._is_in:
            self._star.say(message)

    def begin(self, save: RankSave) -> None:
        """A save of this rank begins: its slot is taken."""
        self._slot_of = save.call.n
        self._last_step = save.begin.step
        if self._gone is not None:  # its trainer had not heard of that when it began
            save.lose(self._gone, is_certain=save.opened is None)

    # ---- of the trainer

    def trainer_is_silent(self, seconds: float) -> None:
        """The trainer was not heard for so long: the others are not to wait for what only it can do."""
        if self._last_step is None:
            last = "before it had begun a save"
        elif any(not save.is_staged for save in self._saves()):
            last = f"while it copied the state of step {self._last_step}"
        else:
            last = f"behind the save of step {self._last_step}"
        self._silent = disagreements.silent(self._enlist.rank, seconds, last)
        _log.warning("%s\nwhy: %s", self._silent.what, self._silent.why)
        self.say(Silent(error=self._silent))
        for save in self._saves():
            save.trainer_is_silent(self._silent)

    def trainer_is_heard(self) -> None:
        """It is there again."""
        self._silent = None
        _log.info("the trainer of rank %d is heard again", self._enlist.rank)
        self.say(Silent())

    # ---- from the hub

    def join(self) -> Join:
        """See ``star.Party``."""
        opened = next((save.opened for save in self._saves() if save.opened is not None), None)
        return Join(
            rank=self._enlist.rank,
            world=self._enlist.world,
            package=__version__,
            member=self._enlist.member,
            open_call=opened,
            ended_calls=list(self._ends),
            slot_of=self._slot_of,
        )

    def welcome(self, epoch: int) -> None:
        """See ``star.Party``."""
        self._faults.at(FaultPoint.WORKER_WELCOMED)
        self._is_in = self.was_in = True
        self._gone = None
        self._send(Enlisted())
        if self._silent is not None:
            self.say(Silent(error=self._silent))
        for save in self._saves():
            save.say_again()

    def hear(self, message: StarMessage) -> None:
        """See ``star.Party``."""
        match message:
            case WantBody(digest=digest):
                save = next((save for save in self._saves() if save.call.digest == digest), None)
                if save is not None:
                    self.say(Body(digest=digest, body=save.body))
            case Open() | Fits() | WantDetails() | Committing() | Ended():
                self._hear_of(message)
            case _:
                self._send(FromHub(message=message))

    def _hear_of(self, message: Open | Fits | WantDetails | Committing | Ended) -> None:
        if isinstance(message, Ended):
            self._ends.append(EndedCall(n=message.n, end="committed" if message.error is None else "failed"))
        elif isinstance(message, Open) and message.verdict != "take":
            self._ends.append(EndedCall(n=message.n, end=message.verdict))
        for save in self._saves():
            if save.call.n == message.n:
                save.hear(message)

    def lost(self, why: str) -> None:
        """See ``star.Party``."""
        self._is_in = False

    def gone(self, error: WireError) -> None:
        """See ``star.Party``."""
        self._is_in = False
        self._gone = error
        self._send(NoHub(error=error))
        is_refused = isinstance(self._star, StarMember) and self._star.is_refused
        for save in self._saves():
            save.lose(error, is_certain=is_refused)

    # ---- for the clerk

    def _begin_of(self, n: int) -> BeginSave | None:
        return next((save.begin for save in self._saves() if save.call.n == n), None)
