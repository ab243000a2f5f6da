"""Which of the ranks that hold the same writes it: a number that each works out alone, and all alike.

Tensors of the same mesh that are cut over the same mesh dimensions are one group: the same ranks hold all of them.
Within a group whole tensors go, largest first, to the replica that has the least bytes so far, so none gets more than
the mean plus the largest tensor.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from aiockpt.planning.placings import Placing
from aiockpt.planning.sharding import Sharding

__all__ = ["share_out"]

Key = tuple[str, str]
"""Folder and name in it: what every rank has, whatever the order in which it met its tensors."""


def share_out(
    keys: Sequence[Key], sizes: Sequence[int], placings: Sequence[Placing], entry_placings: Sequence[int]
) -> list[int]:
    """Return the replica index of each entry; 0 where nobody else holds it.

    Args:
        keys: By entry; no two are equal.
        sizes: By entry: bytes of the whole tensor, so that a rank with a short part reckons as the others do.
        placings: Distinct ones.
        entry_placings: By entry: index into ``placings``.
    """
    replicas = [0] * len(keys)
    numbers: dict[object, int] = {}
    counts: list[int] = []
    groups: list[int | None] = []  # by placing, as numbers: a mesh's ranks are long to hash
    for placing in placings:
        group = None
        if isinstance(placing, Sharding) and placing.replicas > 1:
            shared = placing.mesh, placing.ranks, frozenset(cut.mesh_dim for cut in placing.cuts)
            group = numbers.setdefault(shared, len(numbers))
            if group == len(counts):
                counts.append(placing.replicas)
        groups.append(group)
    members: list[list[int]] = [[] for _ in counts]
    for i, number in enumerate(entry_placings):
        group = groups[number]
        if group is not None:
            members[group].append(i)
    for count, entries in zip(counts, members, strict=True):
        entries.sort(key=lambda i: (-sizes[i], keys[i]))
        loads = [(0, replica) for replica in range(min(count, len(entries)))]  # further ones get nothing
        for i in entries:
            load, replica = loads[0]
            replicas[i] = replica
            heapq.heapreplace(loads, (load + sizes[i], replica))
    return replicas
