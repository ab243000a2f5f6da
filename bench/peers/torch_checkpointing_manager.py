"""torch_checkpointing: its CheckpointManager, which writes from a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

from torch_checkpointing import CheckpointManager
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

from bench.entrant import Entrant, SaveTimes, stopwatch

__all__ = ["TorchCheckpointing"]


class TorchCheckpointing(Entrant):
    """Asynchronous, as it comes, but for direct I/O: its default of True fails on ext4 at the first write."""

    FSYNCS = False

    def open(self) -> None:
        """Make the manager and its staging memory."""
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self.manager = CheckpointManager(CheckpointManager.Config(storage_config=storage))
        self.manager.prewarm_staging(self.state.state_dict())

    def save(self, step: int) -> SaveTimes:
        """Save; the state may change once its lock is free; its future comes without an fsync."""
        elapsed = stopwatch()
        future = self.manager.save(str(self.path(step)), self.state.state_dict())
        blocked = elapsed()
        with self.manager.lock():
            staged = elapsed()
        if future is None:
            raise RuntimeError("the asynchronous manager saved synchronously")
        future.result()
        os.sync()
        return SaveTimes(blocked, staged, elapsed())

    def write(self) -> Path:
        """Not measured: its load maps the files instead of reading them."""
        raise NotImplementedError("torch_checkpointing is not measured restoring")

    def close(self) -> None:
        """End the process."""
        self.manager.close()
