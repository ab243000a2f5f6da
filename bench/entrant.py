"""What a system must do to be measured: as a Saver, as a Restorer."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from bench.state import BenchState

__all__ = ["DONE", "Pending", "Restorer", "SaveTimes", "Saver", "remove", "stopwatch", "timed_save", "tree_nbytes"]


class Pending(Protocol):
    """A save under way. Waiting may happen on another thread than the one that began it."""

    def wait_staged(self) -> None:
        """Return when the state may be changed without touching the snapshot."""

    def wait(self) -> None:
        """Return when the system says that the save is complete."""


class _Done:
    def wait_staged(self) -> None:
        """Return at once."""

    def wait(self) -> None:
        """Return at once."""


DONE: Pending = _Done()
"""What a system answers that saves before its call returns."""


class Saver(ABC):
    """One system in one case, in a process of its own: ``open``, then saves one after another, then ``close``.

    Around each save come ``make_ready`` before it, ``discard`` and ``settle`` after it, none of them timed.
    """

    FSYNCS: ClassVar[bool] = True
    """False where the system ends a save without an fsync; durable then means until ``os.sync()`` returned."""
    OPTIMIZERS_WAIT: ClassVar[bool] = False
    """True where ``optimizer.step()`` waits by itself; elsewhere the training loop calls ``wait_staged``."""

    def __init__(self, state: BenchState, directory: Path) -> None:
        self.state = state
        self.directory = directory

    def open(self) -> None:  # noqa: B027  # most systems have nothing to open
        """Do what a training program does once, before its first save."""

    def make_ready(self, step: int) -> None:  # noqa: B027  # most systems are
        """Do what is no part of the save of a step and comes before it."""

    @abstractmethod
    def begin(self, step: int) -> Pending:
        """Save the state; returns when training may go on."""

    def path(self, step: int) -> Path:
        """Return where the checkpoint of a step goes."""
        return self.directory / f"step-{step}"

    def discard(self, step: int) -> None:
        """Remove the checkpoint of a step, as far as the system does not do so itself."""
        remove(self.path(step))

    def settle(self) -> None:  # noqa: B027  # most systems leave nothing going on
        """Wait for what goes on behind a save that is complete."""

    def facts(self) -> dict[str, float]:
        """Return what else the row of this system says."""
        return {}

    def close(self) -> None:  # noqa: B027  # most systems have nothing to close
        """End what ``open`` began."""


class Restorer(ABC):
    """One system that reads its own checkpoint: ``write`` once, then ``restore`` again and again."""

    WRITER: ClassVar[type[Saver]]
    """Makes the checkpoint."""

    def __init__(self, state: BenchState, directory: Path) -> None:
        self.state = state
        self.directory = directory

    def write(self) -> Path:
        """Write the checkpoint, end the job that wrote it, and return where it is."""
        writer = self.WRITER(self.state, self.directory)
        writer.open()
        writer.begin(0).wait()
        writer.close()
        return writer.path(0)

    @abstractmethod
    def restore(self, path: Path) -> None:
        """Read what ``write`` wrote."""


@dataclass(frozen=True)
class SaveTimes:
    """Seconds from the call of one save until something is true."""

    blocked_s: float
    """The call returned."""
    staged_s: float
    """The state may be changed without touching the snapshot."""
    durable_s: float
    """The bytes would survive a loss of power, as far as the system promises that."""


def timed_save(saver: Saver, step: int) -> SaveTimes:
    """Save once and measure it."""
    elapsed = stopwatch()
    pending = saver.begin(step)
    blocked = elapsed()
    pending.wait_staged()
    staged = elapsed()
    pending.wait()
    if not saver.FSYNCS:
        os.sync()
    return SaveTimes(blocked, staged, elapsed())


def stopwatch() -> Callable[[], float]:
    """Return a function that says how many seconds ago it was made."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start


def remove(path: Path) -> None:
    """Remove a file or a directory with all that is in it."""
    if path.is_dir():
        for entry in path.iterdir():
            remove(entry)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def tree_nbytes(path: Path) -> int:
    """Return the bytes of all files below a path."""
    if path.is_dir():
        return sum(tree_nbytes(entry) for entry in path.iterdir())
    return path.stat().st_size
