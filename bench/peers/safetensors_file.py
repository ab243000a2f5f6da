"""safetensors: save_file, then fsync; load_file."""

from __future__ import annotations

import os

import torch
from safetensors.torch import load_file, save_file

from bench.entrant import Entrant, SaveTimes, stopwatch
from bench.state import flat_tensors

__all__ = ["SafetensorsFile"]


class SafetensorsFile(Entrant):
    """One safetensors file with all tensors of the state; hyperparameters are left out."""

    def save(self, step: int) -> SaveTimes:
        """Save in the calling thread: it is blocked until the file is durable."""
        elapsed = stopwatch()
        save_file(flat_tensors(self.state), self.path(step))
        descriptor = os.open(self.path(step), os.O_RDONLY)
        try:
            os.fsync(descriptor)  # save_file does not; the page cache does not mind which descriptor asks
        finally:
            os.close(descriptor)
        done = elapsed()
        return SaveTimes(done, done, done)

    def restore(self) -> None:
        """Load a fresh dict and touch each page: load_file maps the file, reading would come later."""
        for tensor in load_file(self.path(0)).values():
            tensor.reshape(-1).view(torch.uint8)[::_PAGE_NBYTES].sum()


_PAGE_NBYTES = 4096
