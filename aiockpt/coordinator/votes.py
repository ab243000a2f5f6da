"""The votes of a restore, as meetings of the ranks."""

from __future__ import annotations

import os
import threading

import msgspec

from aiockpt.coordinator.meetings import Meetings
from aiockpt.coordinator.restore_errors import as_exception, as_wire_error
from aiockpt.errors import CheckpointError, RestoreError
from aiockpt.protocol.star import Met
from aiockpt.storage.faults import NO_FAULTS, FaultPoint, Faults
from aiockpt.storage.seen import Seen

__all__ = ["Votes"]

_PHASES = "propose", "match", "read"


class Votes:
    """One call of ``restore`` on one rank; see ``restoring.voting.Voting``.

    A rank's own error is raised by it as it is, with the place added; on the others as one of the same class, so that
    all ranks of a program take the same ``except``.

    Args:
        meetings: Of this rank.
        number: How many-th call of ``restore`` it is; the ranks are told where they differ in that.
        claim: The call with what must be the same on all ranks, as people write it.
        stop: Set when the caller no longer wants to.
        faults: Fault layer.
    """

    is_shared = True

    def __init__(
        self, meetings: Meetings, *, number: int, claim: str, stop: threading.Event, faults: Faults = NO_FAULTS
    ) -> None:
        self.leads = meetings.rank == 0
        self._meetings = meetings
        self._number = number
        self._claim = claim
        self._stop = stop
        self._faults = faults
        self._turn = 0
        """Meetings that are behind us."""
        self._step: int | None = None

    def propose(self, seen: Seen | None, error: BaseException | None) -> Seen | None:
        """See ``Voting``."""
        self._step = None
        met = self._meet(b"" if seen is None else msgspec.json.encode(seen), error)
        if not met.word:
            return None
        found = msgspec.json.decode(met.word, type=Seen)
        self._step = found.step
        return found

    def go(self, error: BaseException | None) -> None:
        """See ``Voting``."""
        self._meet(b"", error)

    def done(self, error: BaseException | None) -> None:
        """See ``Voting``."""
        self._meet(b"", error)

    def is_over(self) -> bool:
        """See ``Voting``."""
        return self._meetings.has_ended(self._meeting)

    def excuse(self, error: BaseException) -> None:
        """Tell the others that this rank's call failed before its first vote."""
        wire = as_wire_error(self._placed(error), phase="propose", step=None)
        self._meetings.excuse(self._meeting, claim=self._claim, error=wire)

    @property
    def _meeting(self) -> str:
        tried, phase = divmod(self._turn, len(_PHASES))
        return f"restore {self._number}, {_PHASES[phase]} {tried + 1}"

    def _meet(self, word: bytes, error: BaseException | None) -> Met:
        self._faults.at(FaultPoint.TRAINER_VOTING, self._meeting)
        phase = _PHASES[self._turn % len(_PHASES)]
        wire = None if error is None else as_wire_error(self._placed(error), phase=phase, step=self._step)
        met = self._meetings.meet(self._meeting, claim=self._claim, word=word, error=wire, stop=self._stop)
        self._turn += 1
        if met.error is None:
            return met
        self._turn += -self._turn % len(_PHASES)  # the next round, where there is one, is another try of all ranks
        is_ours = met.error.rank == self._meetings.rank
        if is_ours and error is not None and wire is not None and met.error.kind == wire.kind:
            raise error
        if is_ours and met.error.kind == "cancelled":
            raise RestoreError(met.error.what, why=met.error.why, next=met.error.next)
        raise as_exception(met.error) from error

    def _placed(self, error: BaseException) -> BaseException:
        """Say on which rank and host it was met."""
        if isinstance(error, CheckpointError):
            error.what = f"{error.what} (rank {self._meetings.rank} on host {os.uname().nodename})"
        return error
