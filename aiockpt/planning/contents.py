"""What several ranks hold and must hold alike: sums of it, compared by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aiockpt.errors import PlanMismatchError
from aiockpt.planning.mismatch import ranks_text

__all__ = ["check_probes", "check_tensors"]

_SHOWN = 5
"""Names in a message; its fields have all."""

Sums = Mapping[str, str]
"""Dotted name → checksum."""


def check_tensors(sums: Mapping[int, Sums]) -> None:
    """See that what nobody declared is the same on all ranks that have it.

    Args:
        sums: By rank, for one rank of each kind.

    Raises:
        PlanMismatchError: Names every tensor that is not.
    """
    keys, ranks = _differing(list(sums.items()))
    if keys:
        raise PlanMismatchError(
            f"the ranks do not agree on {_shown(keys)}",
            why=f"tensors that are no DTensor and not declared as replicated differ on {ranks_text(ranks)}",
            next="put what is meant to differ by rank into aiockpt.PerRank(...), or under a name of its own; "
            "mend what is not",
            keys=tuple(keys),
            ranks=tuple(ranks),
        )


def check_probes(probes: Mapping[int, Mapping[str, Sums]]) -> None:
    """See that declared replicas have not drifted apart.

    Args:
        probes: By rank and group of ranks that hold the same.

    Raises:
        PlanMismatchError: Names every tensor that has.
    """
    groups: dict[str, list[tuple[int, Sums]]] = {}
    for rank, found in probes.items():
        for group, sums in found.items():
            groups.setdefault(group, []).append((rank, sums))
    for held in groups.values():
        keys, ranks = _differing(held)
        if keys:
            raise PlanMismatchError(
                f"replicas of {_shown(keys)} have drifted apart",
                why=f"they are declared to be the same on all ranks, and samples of them differ on {ranks_text(ranks)}",
                next="look for a rank that takes other steps than the others (its data, its seed, a collective that "
                "it misses); restore all ranks from an earlier checkpoint",
                keys=tuple(keys),
                ranks=tuple(ranks),
            )


def _differing(held: Sequence[tuple[int, Sums]]) -> tuple[list[str], list[int]]:
    """Return the names with several sums, and the ranks whose sum is not that of the lowest rank that has the name."""
    known: dict[str, str] = {}
    keys: set[str] = set()
    ranks: set[int] = set()
    for rank, sums in sorted(held, key=lambda item: item[0]):
        for name, found in sums.items():
            if known.setdefault(name, found) != found:
                keys.add(name)
                ranks.add(rank)
    return sorted(keys), sorted(ranks)


def _shown(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(map(repr, keys[:_SHOWN])) + more
