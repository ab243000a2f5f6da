"""Ranks that do not agree on what is saved: what the error says."""

from __future__ import annotations

from collections.abc import Iterable

from aiockpt.errors import PlanMismatchError

__all__ = ["mismatch", "ranks_text"]

_MOST_RUNS = 8


def mismatch(
    key: str, why: str, *, ranks: Iterable[int], next: str = "give it the same dtype, shape and placement on all ranks"
) -> PlanMismatchError:
    """Return the error about one key.

    Args:
        key: Dotted name.
        why: Who has what.
        ranks: Those that differ from the others.
        next: What to do.
    """
    advice = f"{next}; what is meant to differ goes into PerRank(...), or under a name of its own"
    return PlanMismatchError(
        f"the ranks do not agree on {key!r}", why=why, next=advice, keys=(key,), ranks=tuple(sorted(ranks))
    )


def ranks_text(ranks: Iterable[int]) -> str:
    """Return ranks for people: ``rank 3``, ``ranks 0 to 63, 128``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [str(first) if first == last else f"{first} to {last}" for first, last in runs[:_MOST_RUNS]]
    if len(runs) > _MOST_RUNS:
        texts.append("…")
    word = "rank" if len(runs) == 1 and runs[0][0] == runs[0][1] else "ranks"
    return f"{word} {', '.join(texts)}"
