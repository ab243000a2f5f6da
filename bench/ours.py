"""aiockpt itself, in the cases that its users meet."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Literal

import aiockpt
import aiockpt.blocking
from bench.entrant import Entrant, SaveTimes, remove, stopwatch

__all__ = ["FirstSave", "Guarded", "Inline"]

_RETENTION_SECONDS = 30.0


class Guarded(Entrant):
    """The default: what belongs to an optimizer that has stepped is copied behind the call."""

    SNAPSHOT: Literal["guarded", "inline"] = "guarded"

    def open(self) -> None:
        """Open the run and make the arena."""
        self._open(self.directory / "run")

    def _open(self, run: Path) -> None:
        self.run = run
        elapsed = stopwatch()
        self.checkpointer = aiockpt.blocking.Checkpointer(run, keep=aiockpt.Latest(1), snapshot=self.SNAPSHOT)
        self.checkpointer.open()
        self.start_s = elapsed()
        self.checkpointer.prepare(self.state.mapping)

    def path(self, step: int) -> Path:
        """Return where the checkpoint of a step goes."""
        return self.run / f"step-{step}"

    def save(self, step: int) -> SaveTimes:
        """Save; the state may be changed from ``wait_staged`` on (the optimizer waits for that by itself)."""
        return timed_save(self.checkpointer, step, self.state.mapping)

    def discard(self, step: int) -> None:
        """Wait for retention: the last checkpoint goes when the next one is committed, and that costs the disk time."""
        deadline = time.monotonic() + _RETENTION_SECONDS
        while len([name for name in os.listdir(self.run) if "step-" in name]) > 1:
            if time.monotonic() > deadline:
                raise RuntimeError(f"retention left {sorted(os.listdir(self.run))}")
            time.sleep(0.005)

    def write(self) -> Path:
        """Write the checkpoint to restore from, and end the job that wrote it."""
        self.save(0)
        self.checkpointer.close()
        return self.path(0)

    def restore(self) -> None:
        """Restore in place, every checksum verified."""
        restored = aiockpt.blocking.restore(self.run, self.state.mapping)
        if restored is None or restored.step != 0:
            raise RuntimeError(f"restored {restored!r} instead of step 0")

    def facts(self) -> dict[str, float]:
        """Return how long the open took: the run taken, the worker started and ready."""
        return {"start_s": self.start_s}

    def close(self) -> None:
        """Close, all durable."""
        self.checkpointer.close()


class Inline(Guarded):
    """Everything is copied before ``save()`` returns."""

    SNAPSHOT = "inline"


class FirstSave(Guarded):
    """The first save of a job, after ``prepare``: a new job each time."""

    def open(self) -> None:
        """Nothing yet."""

    def save(self, step: int) -> SaveTimes:
        """Open a new run, then measure its first save."""
        self._open(self.directory / f"run-{step}")
        return super().save(step)

    def discard(self, step: int) -> None:
        """End the job and remove its run, so that no later round pays for that."""
        super().close()
        remove(self.run)

    def facts(self) -> dict[str, float]:
        """Nothing was opened."""
        return {}

    def close(self) -> None:
        """Nothing is open."""


def timed_save(checkpointer: aiockpt.blocking.Checkpointer, step: int, state: dict[str, Any]) -> SaveTimes:
    """Save once and measure it."""
    elapsed = stopwatch()
    save = checkpointer.save(step, state)
    blocked = elapsed()
    save.wait_staged()
    staged = elapsed()
    save.result()
    return SaveTimes(blocked, staged, elapsed())
