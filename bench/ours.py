"""aiockpt itself, in the cases that its users meet."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import ClassVar, Literal

import aiockpt
import aiockpt.blocking
from bench.entrant import Restorer, Saver, remove, stopwatch, timed_save
from bench.memory import memory_of, open_fds

__all__ = ["AmongRanks", "FirstSave", "Guarded", "Inline", "Restore"]

_RETENTION_SECONDS = 30.0


class _Pending:
    def __init__(self, save: aiockpt.blocking.Save[aiockpt.Saved]) -> None:
        self._save = save

    def wait_staged(self) -> None:
        """Return when everything is copied."""
        self._save.wait_staged()

    def wait(self) -> None:
        """Return when the checkpoint is durable."""
        self._save.result()


class Guarded(Saver):
    """The default: what belongs to an optimizer that has stepped is copied behind the call."""

    SNAPSHOT: ClassVar[Literal["guarded", "inline"]] = "guarded"
    OPTIMIZERS_WAIT = True

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

    def begin(self, step: int) -> _Pending:
        """Save; the optimizer waits by itself for what is still being copied."""
        return _Pending(self.checkpointer.save(step, self.state.mapping))

    def discard(self, step: int) -> None:
        """Leave that to retention."""

    def settle(self) -> None:
        """Wait for retention: the last checkpoint goes when the next one is committed, and that costs the disk time."""
        deadline = time.monotonic() + _RETENTION_SECONDS
        while len([name for name in os.listdir(self.run) if "step-" in name]) > 1:
            if time.monotonic() > deadline:
                raise RuntimeError(f"retention left {sorted(os.listdir(self.run))}")
            time.sleep(0.005)

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

    def make_ready(self, step: int) -> None:
        """Open a new run."""
        self._open(self.directory / f"run-{step}")

    def settle(self) -> None:
        """End the job and remove its run, so that no later round pays for that."""
        super().close()
        remove(self.run)

    def facts(self) -> dict[str, float]:
        """Nothing was opened."""
        return {}

    def close(self) -> None:
        """Nothing is open."""


class AmongRanks(Guarded):
    """One rank of several, which says what being one costs."""

    def _open(self, run: Path) -> None:
        before = _held(os.getpid())
        self.run = run
        self.checkpointer = aiockpt.blocking.Checkpointer(run, keep=aiockpt.Latest(1))
        elapsed = stopwatch()
        self.checkpointer.open()
        self.costs = {"start_s": elapsed()}
        if self.checkpointer.restore(self.state.mapping) is not None:
            raise RuntimeError(f"{run} is not empty")
        self.costs["formed_s"] = elapsed()
        self.checkpointer.prepare(self.state.mapping)
        first = timed_save(self, 0)
        self.costs |= {"first_blocked_s": first.blocked_s, "first_durable_s": first.durable_s}
        for name, after, was in zip(("bytes", "fds", "threads"), _held(os.getpid()), before, strict=True):
            self.costs[f"trainer_{name}"] = after - was
        worker = self.checkpointer.statistics().worker_pid
        assert worker is not None
        for name, held in zip(("bytes", "fds", "threads"), _held(worker), strict=True):
            self.costs[f"worker_{name}"] = held

    def facts(self) -> dict[str, float]:
        """Return what this rank holds, and how long it took to be one."""
        return self.costs


def _held(pid: int) -> tuple[int, int, int]:
    """Return a process's bytes without shared memory, its descriptors, its threads."""
    pss, shared = memory_of(pid)
    return pss - shared, open_fds(pid), len(os.listdir(f"/proc/{pid}/task"))


class Restore(Restorer):
    """Restore in place, every checksum verified."""

    WRITER = Guarded

    def restore(self, path: Path) -> None:
        """Restore into the live model and optimizer."""
        restored = aiockpt.blocking.restore(path.parent, self.state.mapping)
        if restored is None or restored.step != 0:
            raise RuntimeError(f"restored {restored!r} instead of step 0")
