"""What was measured, as the JSON file says it: medians with the extremes beside them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.entrants import Key
from bench.sizes import gigabytes_per_second

__all__ = ["Floors", "Measured", "Report", "Round", "percentile", "spread"]


def spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Return median, least and greatest of the values under ``name``, ``name_min`` and ``name_max``."""
    if not values:
        return {name: None, f"{name}_min": None, f"{name}_max": None}
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that this share of all does not exceed, one that was measured."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass
class Floors:
    """Samples of the floors in GB/s, by name, each with the number of threads that is best on this machine."""

    threads: dict[str, int] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)

    def add(self, sample: dict[str, float]) -> None:
        """Take in one sample of some floors."""
        for floor, rate in sample.items():
            self.samples.setdefault(floor, []).append(rate)

    def median(self, floor: str) -> float:
        """Return the floor in GB/s."""
        return statistics.median(self.samples[floor])

    def as_json(self) -> dict[str, Any]:
        """Return all floors with their extremes."""
        found: dict[str, Any] = {}
        for floor, rates in self.samples.items():
            found |= spread(f"{floor}_gbps", rates)
        return {**found, "threads": self.threads}


@dataclass(frozen=True)
class Round:
    """One measurement, with the floors that were measured right beside it."""

    times: dict[str, float]
    floors: dict[str, float] = field(default_factory=dict)

    def ratio(self, time: str, floor: str, nbytes: int) -> float:
        """Return how many times as long this took as the floor takes for as many bytes."""
        return self.times[time] * self.floors[floor] * 1e9 / nbytes


@dataclass
class Measured:
    """All rounds of one system in one case."""

    key: Key
    opened: dict[str, Any]
    """What its process said first: bytes of the state, descriptors open before the system was, facts."""
    rounds: list[Round] = field(default_factory=list)
    peak_pss_bytes: int | None = None
    peak_fds: int | None = None
    child_bytes: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that a round saves or restores."""
        return int(self.opened["nbytes"])

    def row(self, total: str, floor: str) -> dict[str, Any]:
        """Return the row of the JSON file.

        Args:
            total: The time that is compared with the floor, ``durable_s`` or ``blocked_s``.
            floor: The name of the floor.
        """
        row: dict[str, Any] = {"system": self.key.system, "case": self.key.case, "nbytes": self.nbytes}
        for name in ("blocked_s", "staged_s", "durable_s"):
            row |= spread(name, [each.times[name] for each in self.rounds if name in each.times])
        row["gbps"] = gigabytes_per_second(self.nbytes, row[total])
        row |= spread("floor_gbps", [each.floors[floor] for each in self.rounds])
        # Round by round: the disk of another minute, or of another place on it, is another disk.
        row |= spread("ratio_to_floor", [each.ratio(total, floor, self.nbytes) for each in self.rounds])
        if all("memcpy" in each.floors for each in self.rounds):
            copies = [each.ratio("blocked_s", "memcpy", self.nbytes) for each in self.rounds]
            row |= spread("blocked_ratio_to_memcpy", copies)
        return row | self.resources() | {"rounds": len(self.rounds)}

    def resources(self) -> dict[str, Any]:
        """Return the part of a row that says what was held."""
        return {
            "peak_pss_bytes": self.peak_pss_bytes,
            "open_fds": None if self.peak_fds is None else self.peak_fds - int(self.opened["descriptors"]),
            "worker_bytes": self.child_bytes,
            "start_s": self.opened.get("start_s"),
            "fsyncs": self.opened.get("fsyncs"),
        }


@dataclass
class Report:
    """The whole of one run."""

    machine: dict[str, Any]
    args: dict[str, Any]
    floors: Floors
    rows: list[dict[str, Any]]
    skipped: list[dict[str, str]]
    notes: list[str]

    def write(self, file: Path) -> None:
        """Write the JSON file."""
        content = {
            "machine": self.machine,
            "args": self.args,
            "floors": self.floors.as_json(),
            "rows": self.rows,
            "skipped": self.skipped,
            "notes": self.notes,
        }
        file.write_text(json.dumps(content, indent=2) + "\n")
