"""torch.save into a file, then fsync; torch.load of all of it."""

from __future__ import annotations

import os

import torch

from bench.entrant import Entrant, SaveTimes, stopwatch

__all__ = ["TorchSave"]


class TorchSave(Entrant):
    """What most training scripts do, with the fsync that most of them leave out."""

    def save(self, step: int) -> SaveTimes:
        """Save in the calling thread: it is blocked until the file is durable."""
        elapsed = stopwatch()
        with self.path(step).open("wb") as file:
            torch.save(self.state.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())
        done = elapsed()
        return SaveTimes(done, done, done)

    def restore(self) -> None:
        """Load a fresh dict; copying it into the model would come on top."""
        torch.load(self.path(0), mmap=False, weights_only=True)
