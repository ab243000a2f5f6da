"""Which checkpoints go after a commit, pure."""

from __future__ import annotations

from collections.abc import Sequence

from aiockpt.config import Latest

__all__ = ["to_prune"]


def to_prune(keep: Latest | None, newest_first: Sequence[int], step: int) -> list[int]:
    """Return the steps to remove once ``step`` is committed.

    Args:
        keep: The rule; None keeps all.
        newest_first: Steps that are committed now, without bad ones.
        step: The step that is about to be the newest; an older checkpoint of it is replaced, not pruned.
    """
    if keep is None:
        return []
    others = [other for other in newest_first if other != step]
    return others[keep.n - 1 :]
