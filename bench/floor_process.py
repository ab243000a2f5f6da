"""The parent's hold on the process that measures the floors, and the choice of the number of threads."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.floors import THREADS

__all__ = ["FloorProcess"]


class FloorProcess:
    """Measures floors in turn with the systems; a context manager.

    The number of threads is chosen once, at the start, by the best median of ``rounds`` samples each.
    """

    def __init__(self, size: int, directory: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.floors", "--size", str(size), "--dir", str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=Path(__file__).resolve().parent.parent,
        )
        self.threads: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self._process.communicate(timeout=60)  # end-of-file is its signal to go
        finally:
            self._process.kill()
            self._process.wait()

    def choose(self, rounds: int) -> dict[str, list[float]]:
        """Find the best number of threads of each floor; returns its samples."""
        kept: dict[str, list[float]] = {}
        for floor, counts in THREADS.items():
            samples: dict[int, list[float]] = {count: [] for count in counts}
            for _ in range(rounds):
                for count in counts:
                    samples[count].append(self._measure(f"{floor} {count}"))
            best = max(counts, key=lambda count: statistics.median(samples[count]))
            self.threads[floor], kept[floor] = best, samples[best]
        return kept

    def sample(self, floors: Sequence[str]) -> dict[str, float]:
        """Measure each of these floors once, in GB/s."""
        os.sync()
        return {floor: self._measure(f"{floor} {self.threads[floor]}") for floor in floors}

    def choose_reading(self, path: Path, before: Callable[[], None]) -> int:
        """Find the best number of threads for reading the files below a path; ``before`` is called before each try."""
        rates: dict[int, float] = {}
        for count in THREADS["read"]:
            before()
            rates[count] = self.reading(path, count)
        return max(rates, key=lambda count: rates[count])

    def reading(self, path: Path, threads: int) -> float:
        """Read the files below a path once; returns GB/s."""
        return self._measure(f"read {threads} {path}")

    def _measure(self, request: str) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{request}\n")
        return float(self._process.stdout.readline())
