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
    """Samples of the floors over the run; a floor is that of the number of threads with the best median."""

    samples: list[dict[str, dict[str, float]]] = field(default_factory=list)

    def best(self, name: str) -> list[float]:
        """Return the samples in GB/s of the best number of threads."""
        threads = self.samples[0][name]
        return max(([sample[name][count] for sample in self.samples] for count in threads), key=statistics.median)

    def median(self, name: str) -> float:
        """Return the floor in GB/s."""
        return statistics.median(self.best(name))

    def as_json(self) -> dict[str, float | None]:
        """Return all three with their extremes."""
        names = ("memcpy_gbps", "write_gbps", "read_gbps")
        return {key: value for name in names for key, value in spread(name, self.best(name)).items()}


@dataclass
class Measured:
    """All rounds of one system in one case."""

    key: Key
    nbytes: int
    descriptors: int
    """Open before the system was."""
    facts: dict[str, float]
    times: list[dict[str, float]] = field(default_factory=list)
    peak_pss_bytes: int | None = None
    peak_fds: int | None = None
    child_bytes: int | None = None

    def row(self, question: str, floors: Floors) -> dict[str, Any]:
        """Return the row of the JSON file."""
        row: dict[str, Any] = {"system": self.key.system, "case": self.key.case, "nbytes": self.nbytes}
        for name in ("blocked_s", "staged_s", "durable_s"):
            row |= spread(name, [times[name] for times in self.times if name in times])
        total = row["durable_s"] if question == "save" else row["blocked_s"]
        floor = floors.median("write_gbps" if question == "save" else "read_gbps")
        row["gbps"] = gigabytes_per_second(self.nbytes, total)
        row["ratio_to_floor"] = floor / row["gbps"]
        if question == "save":
            row["blocked_ratio_to_memcpy"] = row["blocked_s"] * floors.median("memcpy_gbps") * 1e9 / self.nbytes
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
