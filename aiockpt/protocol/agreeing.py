"""At which step all ranks save, where somebody wants a save that no arithmetic gives: the hub's part and a rank's.

The hub asks how far all are, proposes a step ahead of the fastest, and fixes it when nobody has gone past it. A rank
that has accepted and gets there before the verdict stops; no other one waits for anything.
"""

from __future__ import annotations

from enum import Enum, auto

from aiockpt.protocol.orders import Tell
from aiockpt.protocol.star import (
    Agreed,
    AgreedStep,
    Answer,
    AskSave,
    Dropped,
    HowFar,
    Pace,
    Propose,
    StarMessage,
)

__all__ = ["Agreement", "Pacer", "Pause"]

_LEAD_STEPS = 2
_MOST_DOUBLINGS = 6


class _Phase(Enum):
    IDLE = auto()
    ASKING = auto()
    PROPOSING = auto()


class Agreement:
    """The hub's part. Every method returns what to tell whom.

    Nothing is proposed while a rank is away: it might hold what an earlier hub proposed, or have heard the verdict.
    """

    def __init__(self, world: int) -> None:
        self._world = world
        self._joined: set[int] = set()
        self._phase = _Phase.IDLE
        self._round = 0
        self._step = 0
        self._reasons: dict[int, str] = {}
        """By rank: what no step that was agreed on serves for yet."""
        self._paces: dict[int, Pace] = {}
        self._accepted: set[int] = set()
        self._tries = 0
        """Proposals in a row that came too late."""

    def join(self, rank: int) -> list[Tell]:
        """A worker of this rank is there: it may have missed a verdict."""
        self._joined.add(rank)
        return self._ask()

    def lost(self, rank: int) -> list[Tell]:
        """It is away."""
        self._joined.discard(rank)
        if self._phase is _Phase.IDLE:
            return []
        self._phase = _Phase.IDLE
        return self._tell(Dropped())

    def hear(self, rank: int, message: AskSave | Pace | Answer) -> list[Tell]:
        """A rank says something; what belongs to an earlier round is dropped."""
        match message:
            case AskSave():
                self._reasons[rank] = message.reason
                return self._ask() if self._phase is _Phase.IDLE else []
            case Pace() if self._phase is _Phase.ASKING and message.round == self._round:
                self._paces[rank] = message
                return self._propose() if len(self._paces) == self._world else []
            case Answer() if self._phase is _Phase.PROPOSING and message.round == self._round:
                if not message.accepts:
                    self._tries += 1
                    return self._ask()
                self._accepted.add(rank)
                return self._fix() if len(self._accepted) == self._world else []
            case _:
                return []

    def _ask(self) -> list[Tell]:
        if len(self._joined) < self._world:
            return []
        self._phase = _Phase.ASKING
        self._round += 1
        self._paces = {}
        return self._tell(HowFar(round=self._round))

    def _propose(self) -> list[Tell]:
        paces = self._paces.values()
        self._reasons |= {rank: pace.asks for rank, pace in self._paces.items() if pace.asks}
        fastest = max(pace.step for pace in paces)
        last = max((pace.agreed for pace in paces if pace.agreed is not None), key=lambda one: one.step, default=None)
        out = [] if last is None else self._tell(Agreed(agreed=last))
        if last is not None and fastest < last.step:
            self._reasons = {}  # served by what nobody has come to yet
        if not self._reasons:
            self._phase = _Phase.IDLE
            return out + self._tell(Dropped())
        lead = max(_LEAD_STEPS, *(pace.lead for pace in paces)) << min(self._tries, _MOST_DOUBLINGS)
        self._phase, self._step, self._accepted = _Phase.PROPOSING, max(fastest, 0) + lead, set()
        return out + self._tell(Propose(round=self._round, step=self._step))

    def _fix(self) -> list[Tell]:
        reason = self._reasons[min(self._reasons)]
        self._phase, self._reasons, self._tries = _Phase.IDLE, {}, 0
        return self._tell(Agreed(agreed=AgreedStep(step=self._step, reason=reason)))

    def _tell(self, message: StarMessage) -> list[Tell]:
        return [Tell(tuple(sorted(self._joined)), message)]


class Pause(Enum):
    """What ``Pacer.due`` says where it cannot say yet."""

    PAUSE = auto()


class Pacer:
    """A rank's part, which outlives its workers: training asks it at each step."""

    def __init__(self) -> None:
        self._passed = -1
        self._held: int | None = None
        """The step that was proposed and accepted."""
        self._due: dict[int, str] = {}
        self._last: AgreedStep | None = None
        self._saved = -1
        self._asks = ""

    def due(self, step: int) -> str | Pause | None:
        """Return why a save is due at this step, None where none is, and PAUSE where that is not known.

        At PAUSE ask again after each message, and call ``give_up`` when that takes too long.
        """
        for agreed, reason in sorted(self._due.items()):
            if agreed <= step:
                self._passed = max(self._passed, step)
                return reason
        if self._held is not None and self._held <= step:
            return Pause.PAUSE
        self._passed = max(self._passed, step)
        return None

    def give_up(self) -> None:
        """Wait no longer for a verdict: the hub is gone, and ranks may come to differ."""
        self._held = None

    def saved(self, step: int) -> None:
        """``save`` was called."""
        self._saved = max(self._saved, step)
        self._due = {agreed: reason for agreed, reason in self._due.items() if agreed > step}

    def ask(self, reason: str) -> list[StarMessage]:
        """Want a save; return what to tell the hub."""
        self._asks = reason
        return [AskSave(reason=reason)]

    def hear(self, message: StarMessage, *, lead: int = 0) -> list[StarMessage]:
        """The hub says something; return what to tell it.

        Args:
            message: What it says.
            lead: How many steps this rank does in a second.
        """
        match message:
            case HowFar():
                pace = Pace(round=message.round, step=self._passed, lead=lead, asks=self._asks, agreed=self._last)
                return [pace]
            case Propose():
                accepts = message.step > self._passed
                self._held = message.step if accepts else None
                return [Answer(round=message.round, accepts=accepts)]
            case Agreed(agreed=agreed):
                self._held = None
                if self._last is None or agreed.step > self._last.step:
                    self._last = agreed
                    self._asks = ""
                    if agreed.step > self._saved:
                        self._due[agreed.step] = agreed.reason
            case Dropped():
                self._held = None
            case _:
                pass
        return []
