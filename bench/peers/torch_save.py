"""torch.save into a file, then fsync; torch.load of all of it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from bench.entrant import DONE, Pending, Restorer, Saver

__all__ = ["TorchLoad", "TorchSave"]


class TorchSave(Saver):
    """What most training scripts do, with the fsync that most of them leave out."""

    def begin(self, step: int) -> Pending:
        """Save in the calling thread: it is blocked until the file is durable."""
        with self.path(step).open("wb") as file:
            torch.save(self.state.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())
        return DONE


class TorchLoad(Restorer):
    """torch.load into memory of its own; copying it into the model would come on top."""

    WRITER = TorchSave

    def restore(self, path: Path) -> None:
        """Load a fresh dict."""
        torch.load(path, mmap=False, weights_only=True)
