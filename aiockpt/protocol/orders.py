"""What the hub wants done: messages to members, and work in the run directory that answers to it."""

from __future__ import annotations

from dataclasses import dataclass

from aiockpt.protocol.star import Arguments, Details, StarMessage, Written

__all__ = ["CheckPlans", "Commit", "Compare", "Drop", "Look", "MakeAttempt", "Order", "Output", "Tell"]


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a message to these ranks."""

    ranks: tuple[int, ...]
    message: StarMessage


@dataclass(frozen=True, slots=True)
class Look:
    """Look whether the checkpoint of an earlier hub's save stands; answer by ``looked``."""

    n: int
    step: int
    save_id: str


@dataclass(frozen=True, slots=True)
class MakeAttempt:
    """Move an earlier attempt out of the way, make the directories of this one; answer by ``made``."""

    n: int
    step: int
    save_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class CheckPlans:
    """Merge the plans; answer by ``checked``."""

    n: int
    ranks_of: dict[str, tuple[int, ...]]
    """By digest."""
    bodies: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Compare:
    """See that what must be equal on several ranks is; answer by ``compared``."""

    n: int
    attempt: int
    ranks_of: dict[str, tuple[int, ...]]
    details: dict[int, Details]
    """By rank: of one rank for each sum that was said."""


@dataclass(frozen=True, slots=True)
class Commit:
    """Write the manifest and publish; answer by ``committed``."""

    n: int
    arguments: Arguments
    save_id: str
    attempt: int
    written: dict[int, Written]


@dataclass(frozen=True, slots=True)
class Drop:
    """Remove an attempt that failed; needs no answer."""

    n: int
    step: int
    save_id: str
    attempt: int


Order = Look | MakeAttempt | CheckPlans | Compare | Commit | Drop
"""What rank 0 does in the run directory."""
Output = Tell | Order
