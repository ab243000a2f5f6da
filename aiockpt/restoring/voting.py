"""What the ranks of a job decide together in a restore, and how a rank that is alone does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from aiockpt.storage.seen import Seen

__all__ = ["ALONE", "Voting", "voted"]

T = TypeVar("T")


class Voting(Protocol):
    """One restore, in rounds of three calls, each of which returns only after all ranks have made it.

    Where a rank calls with an error, the call raises on all ranks: that error itself where it was met, one of the same
    class elsewhere. So all go on alike, also to the next older checkpoint.
    """

    leads: bool
    """Whether this rank is the one that lists and proposes."""
    is_shared: bool
    """Whether there are other ranks, whose parts of the state this rank does not see."""

    def propose(self, seen: Seen | None, error: BaseException | None) -> Seen | None:
        """Begin a round; returns what the rank that leads has opened, None where nothing is left."""

    def go(self, error: BaseException | None) -> None:
        """All fits, here; on return it does on all ranks, and live state may change."""

    def done(self, error: BaseException | None) -> None:
        """All bytes are in place and verified, here; on return they are on all ranks."""

    def is_over(self) -> bool:
        """Tell whether the call that comes next will raise already, whatever this rank does until then."""


class _Alone:
    leads = True
    is_shared = False

    def propose(self, seen: Seen | None, error: BaseException | None) -> Seen | None:
        _raise(error)
        return seen

    def go(self, error: BaseException | None) -> None:
        _raise(error)

    def done(self, error: BaseException | None) -> None:
        _raise(error)

    def is_over(self) -> bool:
        return False


ALONE: Voting = _Alone()
"""Nobody to ask."""


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise error


def voted(vote: Callable[[BaseException | None], object], work: Callable[[], T]) -> T:
    """Do this rank's part of something, and return once all ranks have done theirs.

    Raises:
        BaseException: What ``work`` raised, or what it did on another rank.
    """
    try:
        result = work()
    except BaseException as exc:
        vote(exc)
        raise
    vote(None)
    return result
