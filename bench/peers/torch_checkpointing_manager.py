"""torch_checkpointing: its CheckpointManager, which writes from a process of its own."""

from __future__ import annotations

from pathlib import Path

from torch_checkpointing import CheckpointManager
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

from bench.entrant import Pending, Restorer, Saver
from bench.peers.futures import FuturePending

__all__ = ["ManagerLoad", "ManagerSave"]


def _config() -> CheckpointManager.Config:
    # As it comes, but for direct I/O: its default of True fails on ext4 at the first write.
    return CheckpointManager.Config(storage_config=LocalFileSystemStorageConfig(use_direct_io=False))


class ManagerSave(Saver):
    """The asynchronous save."""

    FSYNCS = False

    def open(self) -> None:
        """Make the manager and its staging memory."""
        self.manager = CheckpointManager(_config())
        self.manager.prewarm_staging(self.state.state_dict())

    def begin(self, step: int) -> Pending:
        """Save; the state may change once the manager's lock is free; its future comes without an fsync."""
        future = self.manager.save(str(self.path(step)), self.state.state_dict())
        if future is None:
            raise RuntimeError("the asynchronous manager saved synchronously")
        return FuturePending(future, self._wait_for_lock)

    def _wait_for_lock(self) -> None:
        with self.manager.lock():
            pass

    def close(self) -> None:
        """End the process."""
        self.manager.close()


class ManagerLoad(Restorer):
    """Its load, with a manager of its own for each, as in a job that starts."""

    WRITER = ManagerSave

    def restore(self, path: Path) -> None:
        """Load in place, into the tensors of the live state."""
        config = _config()
        config.save = CheckpointManager.Config.with_sync_save().save  # a load needs no process that writes
        manager = CheckpointManager(config)
        manager.load(path, into=self.state.state_dict())
        manager.close()
