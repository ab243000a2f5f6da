"""What ranks are told where they do not agree."""

from __future__ import annotations

from collections.abc import Sequence

from aiockpt.protocol.star import Arguments
from aiockpt.protocol.terms import WireError

__all__ = [
    "claims_differ",
    "differ",
    "failed_before",
    "given_up",
    "gone",
    "late",
    "no_slot",
    "not_met",
    "silent",
    "timed_out",
]

_NAMED_RANKS = 10
"""That a message lists."""


def gone(rank: int, why: str) -> WireError:
    """A rank will take part in no save any more."""
    return WireError(
        kind="peer",
        what=f"rank {rank} is gone",
        why=why,
        next="start the job again; it resumes from the newest checkpoint",
        rank=rank,
    )


def silent(rank: int, seconds: float, last: str) -> WireError:
    """A rank's trainer does not run, and its process is there."""
    return WireError(
        kind="peer",
        what=f"the trainer of rank {rank} has not been heard for {seconds:g} s",
        why=f"its process is stopped, or something holds Python's lock in it; it was last heard {last}",
        next="look at that process (SIGCONT wakes a stopped one), or give Checkpointer a longer stall_timeout",
        rank=rank,
    )


def differ(n: int, first: int, said: Arguments, rank: int, says: Arguments) -> WireError:
    """Two ranks called ``save`` differently in their call number ``n``."""
    if says.step != said.step:
        why = f"rank {first} saves step {said.step}, rank {rank} step {says.step}, each in its call number {n}"
        advice = "call save() at the same steps on all ranks; one of them has called it more often than the other"
    else:
        why = f"rank {first} called it with {_shown(said)}, rank {rank} with {_shown(says)}"
        advice = "give save() the same arguments on all ranks"
    return WireError(kind="mismatch", what="the ranks do not agree on what is saved", why=why, next=advice)


def failed_before() -> WireError:
    """Another rank was told so by a worker of rank 0 that died."""
    return WireError(
        kind="peer",
        what="it failed on all ranks",
        why="the worker of rank 0 died before every rank heard of that",
        next="look at the other ranks for the cause",
        rank=0,
    )


def given_up(rank: int, why: str) -> WireError:
    """A rank's trainer has told its user that the save failed."""
    return WireError(
        kind="peer",
        what=f"rank {rank} gave it up",
        why=why or "its workers died on it, or it was not to wait any longer",
        next=f"look at the log of rank {rank}",
    )


def no_slot(rank: int) -> WireError:
    """A rank skipped a call that the hub had taken: it was about to give its slot back."""
    return WireError(
        kind="peer",
        what=f"rank {rank} had no free slot",
        why="its save before was just being given up",
        next="save again",
    )


def timed_out(said: Arguments) -> WireError:
    """The save's own time is up."""
    return WireError(
        kind="timeout",
        what=f"the save of step {said.step} was not committed within {said.timeout:g} s",
        why="a rank had not written yet, or the plans were not checked",
        next="give it a longer timeout",
    )


def late(step: int, first: int, missing: Sequence[int], seconds: float) -> WireError:
    """Some ranks have not called ``save``."""
    return WireError(
        kind="peer",
        what=f"rank {missing[0]} did not call save({step}) within {seconds:g} s of rank {first}",
        why=f"missing: {_some(missing)}",
        next="call save() on all ranks, or give Checkpointer a longer arrival_timeout",
    )


def not_met(meeting: str, first: int, missing: Sequence[int], seconds: float) -> WireError:
    """Some ranks have not come to a meeting."""
    return WireError(
        kind="peer",
        what=f"rank {missing[0]} did not come to {meeting!r} within {seconds:g} s of rank {first}",
        why=f"missing: {_some(missing)}",
        next="make the same calls on all ranks, equally often, or give Checkpointer a longer arrival_timeout",
        rank=missing[0],
    )


def claims_differ(first: int, claim: str, rank: int, other: str) -> WireError:
    """Two ranks came to one meeting for different things."""
    return WireError(
        kind="mismatch",
        what="the ranks do not agree on what they do together",
        why=f"rank {first} called {claim}, rank {rank} called {other}",
        next="make the same calls with the same arguments on all ranks",
        rank=rank,
        ranks=sorted((first, rank)),
    )


def _some(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:_NAMED_RANKS])) + (", …" if len(ranks) > _NAMED_RANKS else "")


def _shown(said: Arguments) -> str:
    return f"overwrite={said.overwrite}, when_busy={said.when_busy!r}, timeout={said.timeout}"
