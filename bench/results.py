"""What was measured, as the JSON file says it: medians with the extremes beside them."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.entrant import Key
from bench.sizes import gigabytes_per_second

__all__ = ["Floors", "Measured", "Report", "spread"]


def spread(name: str, values: list[float]) -> dict[str, float | None]:
    """Return median, least and greatest of the values under ``name``, ``name_min`` and ``name_max``."""
    if not values:
        return {name: None, f"{name}_min": None, f"{name}_max": None}
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


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


@dataclass
class Measured:
    """All rounds of one system in one case."""

    key: Key
    nbytes: int
    descriptors: int
    """Open before the system was."""
    facts: dict[str, float]
    times: list[dict[str, float]] = field(default_factory=list)
    floors: Floors = field(default_factory=Floors)
    """Sampled in turn with these rounds: the disk of another minute is another disk."""
    peak_pss_bytes: int | None = None
    peak_fds: int | None = None
    child_bytes: int | None = None

    def row(self, question: str) -> dict[str, Any]:
        """Return the row of the JSON file."""
        row: dict[str, Any] = {"system": self.key.system, "case": self.key.case, "nbytes": self.nbytes}
        for name in ("blocked_s", "staged_s", "durable_s"):
            row |= spread(name, [times[name] for times in self.times if name in times])
        total = row["durable_s"] if question == "save" else row["blocked_s"]
        floor = self.floors.median("write" if question == "save" else "read")
        row["gbps"] = gigabytes_per_second(self.nbytes, total)
        row["ratio_to_floor"] = floor / row["gbps"]
        if question == "save":
            row["blocked_ratio_to_memcpy"] = row["blocked_s"] * self.floors.median("memcpy") * 1e9 / self.nbytes
        row["peak_pss_bytes"] = self.peak_pss_bytes
        row["open_fds"] = None if self.peak_fds is None else self.peak_fds - self.descriptors
        row["worker_bytes"] = self.child_bytes
        row["start_s"] = self.facts.get("start_s")
        row["rounds"] = len(self.times)
        return row


@dataclass
class Report:
    """The whole of one run."""

    question: str
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
