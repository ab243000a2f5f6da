"""Who of a group of processes lives, who has ended, and what that means for the others: pure code."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from aiockpt.elastic.failures.process_failure import Cause

__all__ = ["End", "Group"]


@dataclass(frozen=True, slots=True)
class End:
    """How one process ended.

    Attributes:
        exitcode: Negative for a signal.
        detected_ns: When the guardian saw it, on ``CLOCK_MONOTONIC``.
        order: The how many-th end this was, from 0: what names the first failure where times are equal.
        cause: None for a success.
        sent_signal: The last signal that we had sent to it.
        sent_ns: When the first one was sent, as ``detected_ns``; 0 for never.
    """

    rank: int
    pid: int
    exitcode: int
    detected_ns: int
    order: int
    cause: Cause | None
    sent_signal: signal.Signals | None
    sent_ns: int


class Group:
    """The processes of one context: all succeed, or all are stopped.

    Args:
        nprocs: Number of processes; their ranks are 0 to ``nprocs - 1``.
        owes_value: Whether one that ends well must have sent a value, as functions do.
    """

    def __init__(self, nprocs: int, *, owes_value: bool) -> None:
        self.nprocs = nprocs
        self.pids: dict[int, int] = {}
        self.ends: dict[int, End] = {}
        self.signals_sent: list[str] = []
        self._owes_value = owes_value
        self._sent: dict[int, signal.Signals] = {}
        self._sent_ns: dict[int, int] = {}

    @property
    def is_launched(self) -> bool:
        """Whether every process was started."""
        return len(self.pids) == self.nprocs

    @property
    def is_over(self) -> bool:
        """Whether every process that was started has ended."""
        return self.ends.keys() >= self.pids.keys()

    @property
    def has_failed(self) -> bool:
        """Whether one has failed."""
        return any(end.cause is not None for end in self.ends.values())

    @property
    def living(self) -> list[int]:
        """Ranks that run."""
        return [rank for rank in self.pids if rank not in self.ends]

    def launch(self, rank: int, pid: int) -> None:
        """Take in that a process was started."""
        self.pids[rank] = pid

    def sent(self, ranks: list[int], signum: int, now_ns: int) -> None:
        """Take in that these were signalled in order to end."""
        self._sent.update(dict.fromkeys(ranks, signal.Signals(signum)))
        self._sent_ns = {**dict.fromkeys(ranks, now_ns), **self._sent_ns}
        self.signals_sent.append(signal.Signals(signum).name)

    def end(self, rank: int, exitcode: int, detected_ns: int, *, has_value: bool) -> None:
        """Take in that a process has ended."""
        sent = self._sent.get(rank)
        if exitcode == 0 and (has_value or not self._owes_value):
            cause = None
        elif sent is not None:
            cause = Cause.STOPPED
        else:
            cause = Cause.NO_RESULT if exitcode == 0 else Cause.OWN
        self._note(rank, exitcode, detected_ns, cause)

    def lose(self, detected_ns: int) -> None:
        """Take in that the guardian is gone, and all that still ran with it."""
        for rank in self.living:
            self._note(rank, -signal.SIGKILL, detected_ns, Cause.GUARDIAN)

    def abandon(self, detected_ns: int) -> None:
        """Take in that the rest does not end though it was killed."""
        for rank in self.living:
            self._note(rank, -signal.SIGKILL, detected_ns, Cause.STOPPED)

    def _note(self, rank: int, exitcode: int, detected_ns: int, cause: Cause | None) -> None:
        sent, sent_ns = self._sent.get(rank), self._sent_ns.get(rank, 0)
        self.ends[rank] = End(
            rank, self.pids[rank], exitcode, detected_ns, len(self.ends), cause, sent_signal=sent, sent_ns=sent_ns
        )
