"""safetensors: save_file, then fsync; load_file."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.entrant import DONE, Pending, Restorer, Saver

__all__ = ["SafetensorsLoad", "SafetensorsSave"]

_PAGE_NBYTES = 4096


class SafetensorsSave(Saver):
    """One safetensors file with all tensors of the state; hyperparameters are left out."""

    def begin(self, step: int) -> Pending:
        """Save in the calling thread: it is blocked until the file is durable."""
        save_file(self.state.tensors(), self.path(step))
        descriptor = os.open(self.path(step), os.O_RDONLY)
        try:
            os.fsync(descriptor)  # save_file does not; the page cache does not mind which descriptor asks
        finally:
            os.close(descriptor)
        return DONE


class SafetensorsLoad(Restorer):
    """load_file, every page of it touched: it maps the file, reading would come later."""

    WRITER = SafetensorsSave

    def restore(self, path: Path) -> None:
        """Load a fresh dict and touch each page."""
        for tensor in load_file(path).values():
            tensor.reshape(-1).view(torch.uint8)[::_PAGE_NBYTES].sum()
