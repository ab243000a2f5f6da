"""Counts what happens to the saves of one run."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

from aiockpt.coordinator.statistics import Durations, Phases, Rate, Statistics
from aiockpt.errors import SaveCancelledError, TornSnapshotError

__all__ = ["Tally"]


class Tally:
    """Every method may be called from any thread, and waits for nothing."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler that asks may interrupt who counts
        self.counts: Counter[str] = Counter()
        """By the fields of ``Statistics``; ``count`` changes them."""
        self._phases: dict[str, Durations] = {}
        self._guard_wait = Durations()
        self._stage_rate = Rate()
        self._write_rate = Rate()
        self._last: tuple[int, float] | None = None

    def count(self, name: str, by: int = 1) -> None:
        """Add to one of the counters of ``Statistics``."""
        with self._lock:
            self.counts[name] += by

    def spent(self, phase: str, seconds: float) -> None:
        """Add a time to one of the fields of ``Phases``."""
        with self._lock:
            self._phases[phase] = self._phases.get(phase, Durations()).plus(seconds)

    def guard_waited(self, seconds: float) -> None:
        """An optimizer's step waited for a copy."""
        with self._lock:
            self._guard_wait = self._guard_wait.plus(seconds)

    def staged(self, nbytes: int, seconds: float) -> None:
        """A save's bytes are all in shared memory."""
        with self._lock:
            self.count("staged_nbytes", nbytes)
            self._stage_rate = self._stage_rate.plus(nbytes, seconds)

    def committed(self, step: int, nbytes: int, timings: dict[str, float]) -> None:
        """A save became a checkpoint; ``timings`` are the worker's, which lack where it died behind the commit."""
        with self._lock:
            self.count("committed")
            self.count("committed_nbytes", nbytes)
            self.count("buffered", 1 if timings.get("buffered") else 0)
            self._last = step, time.time()
            for phase in ("write", "sync", "commit"):
                if phase in timings:
                    self.spent(phase, timings[phase])
            if "write" in timings:
                self._write_rate = self._write_rate.plus(nbytes, timings["write"] + timings.get("sync", 0.0))

    def failed(self, error: BaseException) -> None:
        """A save ended without a checkpoint."""
        with self._lock:
            self.count("cancelled" if isinstance(error, SaveCancelledError) else "failed")
            self.count("torn", int(isinstance(error, TornSnapshotError)))

    def statistics(self, **others: Any) -> Statistics:
        """Return all figures, with those that are read elsewhere."""
        with self._lock:
            step, at = self._last or (None, None)
            counts: dict[str, Any] = {name: self.counts[name] for name in _COUNTERS}
            return Statistics(
                **(counts | others),
                last_step=step,
                last_committed_at=at,
                phases=Phases(**self._phases),
                guard_wait=self._guard_wait,
                stage_rate=self._stage_rate,
                write_rate=self._write_rate,
            )


_COUNTERS = (
    "committed",
    "failed",
    "torn",
    "cancelled",
    "skipped",
    "retried",
    "buffered",
    "staged_nbytes",
    "written_nbytes",
    "committed_nbytes",
    "dropped_answers",
    "dropped_spans",
)
