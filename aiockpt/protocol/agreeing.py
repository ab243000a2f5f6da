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
_MOST_REASONS = 16
"""Of one agreed step; what else is wanted gets a step of its own."""


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
                # Since a rank said how far it is it may have gone past what would serve this.
                is_late = self._phase is _Phase.ASKING and rank in self._paces
                return self._ask() if self._phase is _Phase.IDLE or is_late else []
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
            self._serve(last.reasons)  # by what nobody has come to yet
        if not self._reasons:
            self._phase = _Phase.IDLE
            return out + self._tell(Dropped())
        lead = max(_LEAD_STEPS, *(pace.lead for pace in paces)) << min(self._tries, _MOST_DOUBLINGS)
        step = max(max(fastest, 0) + lead, 0 if last is None else last.step + 1)  # what is agreed on only ever grows
        self._phase, self._step, self._accepted = _Phase.PROPOSING, step, set()
        return out + self._tell(Propose(round=self._round, step=self._step))

    def _fix(self) -> list[Tell]:
        reasons = list(dict.fromkeys(self._reasons[rank] for rank in sorted(self._reasons)))[:_MOST_REASONS]
        self._phase, self._tries = _Phase.IDLE, 0
        self._serve(reasons)
        out = self._tell(Agreed(agreed=AgreedStep(step=self._step, reasons=reasons)))
        return out + (self._ask() if self._reasons else [])

    def _serve(self, reasons: list[str]) -> None:
        self._reasons = {rank: reason for rank, reason in self._reasons.items() if reason not in reasons}

    def _tell(self, message: StarMessage) -> list[Tell]:
        return [Tell(tuple(sorted(self._joined)), message)]


class Pause(Enum):
    """What ``Pacer.due`` says where it cannot say yet."""

    PAUSE = auto()


class Pacer:
    """A rank's part, which outlives its workers: training asks it at each step.

    A loop may leave by the reason that it is given. So every reason that somebody has asked for is given on all ranks
    at one step, in one wording, and stands until a save is called that ``due`` has given it for.
    """

    def __init__(self) -> None:
        self._passed = -1
        self._held: int | None = None
        """The step that was proposed and accepted."""
        self._due: list[AgreedStep] = []
        """Agreed on and not served, ascending."""
        self._answered = -1
        """The last agreed step that ``due`` has given the reasons of."""
        self._last: AgreedStep | None = None
        self._asks = ""

    def due(self, step: int) -> str | Pause | None:
        """Return why a save is due at this step, None where none is, and PAUSE where that is not known.

        At PAUSE ask again after each message, and call ``give_up`` when that takes too long.
        """
        if self._held is not None and self._held <= step:
            return Pause.PAUSE
        self._passed = max(self._passed, step)
        due = [agreed for agreed in self._due if agreed.step <= step]
        if not due:
            return None
        self._answered = due[-1].step
        return ", ".join(dict.fromkeys(reason for agreed in due for reason in agreed.reasons))

    def give_up(self) -> None:
        """Wait no longer for a verdict: the hub is gone, and ranks may come to differ."""
        self._held = None

    def saved(self) -> None:
        """``save`` was called: what ``due`` has answered so far is served."""
        self._due = [agreed for agreed in self._due if agreed.step > self._answered]

    def ask(self, reason: str) -> list[StarMessage]:
        """Want a save; return what to tell the hub."""
        self._asks = reason
        return self.pending()

    def pending(self) -> list[StarMessage]:
        """Return what to tell a hub that may not have heard it: what is asked for, and not agreed on."""
        return [AskSave(reason=self._asks)] if self._asks else []

    @property
    def is_expecting(self) -> bool:
        """Whether a save is asked for here, or agreed on, that was not called yet."""
        return bool(self._asks or self._due)

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
                if agreed.step > self._passed and self._asks in agreed.reasons:
                    self._asks = ""
                if self._last is None or agreed.step > self._last.step:
                    self._last = agreed
                    self._due.append(agreed)
            case Dropped():
                self._held = None
            case _:
                pass
        return []
