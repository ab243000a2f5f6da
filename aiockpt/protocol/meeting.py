"""A barrier by name that carries a word: all ranks go past it with what rank 0 said, or none does.

The hub's part and a rank's. A meeting ends well once all ranks have attended, and badly with the first error that the
hub hears or finds; its end is told to all, also to ranks that are not there yet. One meeting has one end: a rank
remembers the last ones, and a later hub hears these from every rank before it decides anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from aiockpt.protocol import disagreements
from aiockpt.protocol.hub import SILENT_RETURN_SECONDS
from aiockpt.protocol.orders import Tell
from aiockpt.protocol.star import Attend, Met, Recall, StarMessage
from aiockpt.protocol.terms import WireError

__all__ = ["REMEMBERED", "Guest", "Room"]

REMEMBERED = 64
"""Ends that a rank keeps, and recalls. One that waits for all in a meeting is at most one behind the others, but for
those that ended badly without it."""
KNOWN = 2 * REMEMBERED
"""Ends that the hub keeps: more than any rank recalls. Else one that a rank has and the hub forgot would push out the
next one, which the rank recalls then, and so on up to the newest, which that rank may still wait for."""


@dataclass(slots=True)
class _Meeting:
    claim: str
    first_rank: int
    first_at: float
    attended: set[int] = field(default_factory=set)
    word: bytes = b""


class Room:
    """The hub's part. Every method returns what to tell whom.

    Args:
        world: How many ranks there are.
        arrival_timeout: Seconds from the first attendance at a meeting until all must have come; None: no limit.
        is_first: Whether no hub of this job came before.
    """

    def __init__(self, world: int, *, arrival_timeout: float | None, is_first: bool = True) -> None:
        self._world = world
        self._arrival_timeout = arrival_timeout
        self._open: dict[str, _Meeting] = {}
        self._ended: dict[str, Met] = {}
        """The last ones, the oldest first."""
        self._joined: set[int] = set()
        self._gone: dict[int, str] = {}
        self._silent: dict[int, WireError] = {}
        self._unheard: set[int] = set() if is_first else set(range(world))
        """Ranks that may know of ends that an earlier hub has told."""
        self._early: dict[tuple[int, str], tuple[Attend, float]] = {}
        """By rank and meeting: what was said before all of these were heard, and when."""

    def join(self, rank: int) -> None:
        """A worker of this rank is there; what the rank knows and wants follows."""
        self._joined.add(rank)
        self._gone.pop(rank, None)

    def lost(self, rank: int) -> None:
        """It is away. Its trainer says again what it has said, by its next worker."""
        self._joined.discard(rank)

    def hear(self, rank: int, message: Attend | Recall, now: float) -> list[Tell]:
        """A rank attends a meeting, again perhaps, or says how earlier ones ended."""
        match message:
            case Recall():
                self._unheard.discard(rank)
                out = [tell for met in message.mets for tell in self._end(met)]
                return out + self._decide_early()
            case Attend() if self._unheard:
                self._early[rank, message.meeting] = message, now
                return []
            case Attend():
                return self._attend(rank, message, now)

    def tick(self, now: float, gone: Mapping[int, str], silent: Mapping[int, WireError]) -> list[Tell]:
        """Let time pass.

        Args:
            now: The hub's clock.
            gone: By rank: why it takes part in nothing any more.
            silent: By rank: what is to be said of its trainer, which is not heard now.
        """
        news = silent.keys() - self._silent.keys()
        self._gone, self._silent = dict(gone), dict(silent)
        self._unheard -= self._gone.keys()
        if self._early and self._is_late(self._first_early(), now):
            self._unheard.clear()
        out = self._decide_early()
        for name, meeting in list(self._open.items()):
            missing = self._silent.keys() - meeting.attended
            if self._gone:
                out += self._fail(name, self._someone_gone())
            elif missing and (missing & news or now - meeting.first_at >= SILENT_RETURN_SECONDS):
                out += self._fail(name, self._silent[min(missing & news or missing)])
            elif self._is_late(meeting.first_at, now):
                out += self._fail(name, self._not_met(name, meeting))
        return out

    def next_deadline(self) -> float | None:
        """When ``tick`` has something to do, as things stand."""
        if self._arrival_timeout is None:
            return None
        since = [meeting.first_at for meeting in self._open.values()]
        if self._early:
            since.append(self._first_early())
        return min(since) + self._arrival_timeout if since else None

    def _is_late(self, since: float, now: float) -> bool:
        return self._arrival_timeout is not None and now - since >= self._arrival_timeout

    def _first_early(self) -> float:
        return min(said_at for _, said_at in self._early.values())

    def _decide_early(self) -> list[Tell]:
        if self._unheard:
            return []
        early, self._early = self._early, {}
        return [tell for (rank, _), (message, at) in early.items() for tell in self._attend(rank, message, at)]

    def _attend(self, rank: int, message: Attend, now: float) -> list[Tell]:
        name = message.meeting
        if (ended := self._ended.get(name)) is not None:
            return self._tell({rank}, ended)
        meeting = self._open.setdefault(name, _Meeting(message.claim, rank, now))
        meeting.attended.add(rank)
        if rank == 0:
            meeting.word = message.word
        if message.error is not None:
            return self._fail(name, msgspec.structs.replace(message.error, rank=rank))
        if message.claim != meeting.claim:
            return self._fail(name, disagreements.claims_differ(meeting.first_rank, meeting.claim, rank, message.claim))
        if self._gone:
            return self._fail(name, self._someone_gone())
        if len(meeting.attended) == self._world:
            return self._end(Met(meeting=name, word=meeting.word))
        return []

    def _not_met(self, name: str, meeting: _Meeting) -> WireError:
        assert self._arrival_timeout is not None
        missing = sorted(set(range(self._world)) - meeting.attended)
        return disagreements.not_met(name, meeting.first_rank, missing, self._arrival_timeout)

    def _someone_gone(self) -> WireError:
        rank = min(self._gone)
        return msgspec.structs.replace(disagreements.gone(rank, self._gone[rank]), rank=rank)

    def _fail(self, name: str, error: WireError) -> list[Tell]:
        return self._end(Met(meeting=name, error=error))

    def _end(self, met: Met) -> list[Tell]:
        self._open.pop(met.meeting, None)
        if met.meeting in self._ended:
            return []
        _remember(self._ended, met, KNOWN)
        return self._tell(self._joined, met)

    def _tell(self, ranks: set[int], message: StarMessage) -> list[Tell]:
        told = tuple(sorted(ranks & self._joined))
        return [Tell(told, message)] if told else []


class Guest:
    """A rank's part, which outlives its workers. What a method returns is to be said to the hub, in order."""

    def __init__(self) -> None:
        self._open: dict[str, Attend] = {}
        self._ended: dict[str, Met] = {}

    def attend(self, message: Attend) -> list[StarMessage]:
        """Come to a meeting; come again to take back that all is well."""
        if message.meeting in self._ended:
            return []
        self._open[message.meeting] = message
        return [message]

    def hear(self, met: Met) -> None:
        """A meeting has ended; also one that this rank has not come to yet."""
        self._open.pop(met.meeting, None)
        if met.meeting not in self._ended:
            _remember(self._ended, met, REMEMBERED)

    def answer(self, meeting: str) -> Met | None:
        """Return how a meeting ended, None where it has not."""
        return self._ended.get(meeting)

    def leave(self, meeting: str) -> None:
        """Wait for the end of a meeting no longer."""
        self._open.pop(meeting, None)

    def rejoined(self) -> list[StarMessage]:
        """A worker of ours has joined the hub, which may be another one than before."""
        return [Recall(mets=list(self._ended.values())), *self._open.values()]


def _remember(ended: dict[str, Met], met: Met, most: int) -> None:
    ended[met.meeting] = met
    if len(ended) > most:
        del ended[next(iter(ended))]
