"""What a coordinator needs of its run, whichever rank it is."""

from __future__ import annotations

from typing import Protocol

from aiockpt.storage.run_directory import Committed, Unreadable

__all__ = ["HeldRun"]


class HeldRun(Protocol):
    """A ``RunClaim`` on rank 0 and where one is alone, a ``FollowedRun`` on every other rank.

    Every method may block on the disk.
    """

    run: str
    run_id: str
    term: int
    checkpoints: list[Committed]
    bad: list[Unreadable]
    highest_ordinal: int
    trash: list[str]

    def find(self, step: int, save_id: str) -> Committed | None:
        """Return ``step-N`` where it stands now and is that of this save."""

    def fence(self, attempt: str) -> bool:
        """See that no late rename of an attempt's worker finds it; False where it was not there."""

    def mark_bad(self, checkpoint: Committed | Unreadable, why: str) -> str:
        """Put a checkpoint aside that was found bad; returns where it is."""

    def release(self) -> None:
        """Let go of the run."""

    def forget_in_child(self) -> None:
        """Close what a forked child got a copy of."""
