"""One save of a job as the hub knows it."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from enum import Enum, auto

from aiockpt.protocol.star import Arguments, Arrive, Ended, Verdict, Written

__all__ = ["Call", "Phase"]


class Phase(Enum):
    """How far it is."""

    DECIDED = auto()
    """Not taken: there is nothing to write."""
    MAKING = auto()
    OPEN = auto()
    COMMITTING = auto()
    ENDED = auto()


@dataclass(slots=True)
class Call:
    """What the ranks said, and what became of it."""

    n: int
    arguments: Arguments
    first_rank: int
    first_at: float
    verdict: Verdict
    save_id: str = ""
    attempt: int = 0
    phase: Phase = Phase.DECIDED
    arrived: set[int] = field(default_factory=set)
    ranks_of: dict[str, dict[int, None]] = field(default_factory=dict)
    """By digest: who has this plan, as they came. Few digests for thousands of ranks: what is done per arrival must
    not look at every rank."""
    written: dict[int, Written] = field(default_factory=dict)
    plans_fit: bool = False
    is_checking: bool = False
    is_waiting: set[int] = field(default_factory=set)
    """Ranks whose worker died before it had written: they come again, or are given up."""
    ended: Ended | None = None

    @property
    def is_open(self) -> bool:
        """Whether it was taken and has no end yet."""
        return self.verdict == "take" and self.ended is None

    def arrive(self, rank: int, arrive: Arrive) -> None:
        """A rank has called ``save``, or its next worker says so again."""
        if rank in self.arrived:
            for ranks in self.ranks_of.values():
                ranks.pop(rank, None)
            self.ranks_of = {digest: ranks for digest, ranks in self.ranks_of.items() if ranks}
        self.arrived.add(rank)
        self.ranks_of.setdefault(arrive.digest, {})[rank] = None

    def has_plan_of(self, rank: int, digests: Container[str]) -> bool:
        """Tell whether the plan of this rank is among these."""
        return any(rank in ranks for digest, ranks in self.ranks_of.items() if digest in digests)

    def sorted_ranks(self) -> dict[str, tuple[int, ...]]:
        """Return by digest who has this plan."""
        return {digest: tuple(sorted(ranks)) for digest, ranks in self.ranks_of.items()}

    def unequal(self) -> tuple[str, int, int] | None:
        """Return what differs, and between whom, among ranks with one plan; None where all is equal."""
        for ranks in self.sorted_ranks().values():
            first = self.written[ranks[0]]
            for rank in ranks:
                if self.written[rank].values_sum != first.values_sum:
                    return "values", ranks[0], rank
                if self.written[rank].tensors_sum != first.tensors_sum:
                    return "tensors", ranks[0], rank
        return None

    def end(self, outcome: Ended) -> None:
        """It is over; what only an open one needs is forgotten: thousands of ranks times many saves."""
        self.ended = outcome
        self.phase = Phase.ENDED
        self.arrived, self.ranks_of, self.written, self.is_waiting = set(), {}, {}, set()
