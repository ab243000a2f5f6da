"""One save of a job as the hub knows it."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from enum import Enum, auto

from aiockpt.protocol.star import Arguments, Arrive, Details, Ended, Verdict, Written

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
    is_checking: bool = False
    extra: dict[int, list[str]] | None = None
    """Once the plans fit: by rank the folders of undeclared tensors that it writes; ranks that write none are left
    out."""
    witnesses: tuple[int, ...] = ()
    """Ranks that were asked for details, one for each sum that was said."""
    details: dict[int, Details] = field(default_factory=dict)
    is_comparing: bool = False
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

    def lacks_details_of(self, rank: int) -> bool:
        """Tell whether this rank was asked for details and has not answered."""
        return rank in self.witnesses and rank not in self.details

    def sorted_ranks(self) -> dict[str, tuple[int, ...]]:
        """Return by digest who has this plan."""
        return {digest: tuple(sorted(ranks)) for digest, ranks in self.ranks_of.items()}

    def find_witnesses(self) -> tuple[int, ...]:
        """Return one rank for each plan and sum that was said, the lowest: what they have, all have."""
        lowest: dict[object, int] = {}
        for digest, ranks in self.sorted_ranks().items():
            for rank in ranks:
                written = self.written[rank]
                lowest.setdefault((digest, written.values_sum, written.tensors_sum), rank)
        probed: dict[str, dict[str, int]] = {}
        for rank in sorted(self.written):
            for group, found in self.written[rank].probes.items():
                probed.setdefault(group, {}).setdefault(found, rank)
        differing = (rank for sums in probed.values() if len(sums) > 1 for rank in sums.values())
        return tuple(sorted({*lowest.values(), *differing}))

    def begin_again(self) -> None:
        """All ranks write anew."""
        self.attempt += 1
        self.phase = Phase.MAKING
        self.written, self.witnesses, self.details, self.is_comparing = {}, (), {}, False

    def end(self, outcome: Ended) -> None:
        """It is over; what only an open one needs is forgotten: thousands of ranks times many saves."""
        self.ended = outcome
        self.phase = Phase.ENDED
        self.arrived, self.ranks_of, self.written, self.is_waiting = set(), {}, {}, set()
        self.extra, self.witnesses, self.details = None, (), {}
