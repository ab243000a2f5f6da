"""Which of the ranks of a job this process is."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ALONE", "Ranks"]


class Ranks(NamedTuple):
    """The ranks that save together: those of a process group."""

    rank: int
    """Of this process in the group."""
    world: int
    """How many the group has."""
    members: tuple[int, ...]
    """By rank in the group: the global rank, by which meshes count."""


ALONE = Ranks(0, 1, (0,))
