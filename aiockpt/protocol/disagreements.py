"""What ranks are told where they do not agree."""

from __future__ import annotations

from collections.abc import Sequence

from aiockpt.protocol.messages import WireError
from aiockpt.protocol.star import Arguments

__all__ = ["differ", "failed_before", "gone", "late", "timed_out", "unequal"]

_NAMED_RANKS = 10
"""That a message lists."""


def gone(rank: int, why: str) -> WireError:
    """A rank will take part in no save any more."""
    return WireError(
        kind="peer",
        what=f"rank {rank} is gone",
        why=why,
        next="start the job again; it resumes from the newest checkpoint",
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
    )


def unequal(what: str, first: int, rank: int) -> WireError:
    """Plain tensors or values are not the same on two ranks."""
    return WireError(
        kind="mismatch",
        what=f"plain {what} differ between rank {first} and rank {rank}",
        why="what is no DTensor and not declared as replicated must be equal on all ranks",
        next="wrap what differs by rank in aiockpt.PerRank, or save it under a key of its own",
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
    some = ", ".join(map(str, missing[:_NAMED_RANKS])) + (", …" if len(missing) > _NAMED_RANKS else "")
    return WireError(
        kind="peer",
        what=f"rank {missing[0]} did not call save({step}) within {seconds:g} s of rank {first}",
        why=f"missing: {some}",
        next="call save() on all ranks, or give Checkpointer a longer arrival_timeout",
    )


def _shown(said: Arguments) -> str:
    return f"overwrite={said.overwrite}, when_busy={said.when_busy!r}, timeout={said.timeout}"
