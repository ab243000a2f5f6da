"""torchsnapshot: Snapshot.async_take, and its restore."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchsnapshot import Snapshot, StateDict

from bench.entrant import Pending, Restorer, Saver
from bench.state import BenchState

__all__ = ["AsyncTake", "SnapshotRestore"]


def _app_state(state: BenchState) -> dict[str, Any]:
    """Return the state as torchsnapshot takes it: objects with ``state_dict`` at the top."""
    return {name: value if hasattr(value, "state_dict") else StateDict(value) for name, value in state.mapping.items()}


class _Pending:
    def __init__(self, pending: Any) -> None:
        self._pending = pending

    def wait_staged(self) -> None:
        """Return at once: the call returned when the state was copied."""

    def wait(self) -> None:
        """Return when the snapshot's metadata is written; raises what the save raised."""
        self._pending.wait()


class AsyncTake(Saver):
    """The asynchronous save, as it comes; it has nothing to open."""

    FSYNCS = False

    def begin(self, step: int) -> Pending:
        """Save; the call returns when the state is copied."""
        return _Pending(Snapshot.async_take(str(self.path(step)), _app_state(self.state)))


class SnapshotRestore(Restorer):
    """Snapshot.restore, which reads into the live tensors where it can."""

    WRITER = AsyncTake

    def restore(self, path: Path) -> None:
        """Restore into the live model and optimizer."""
        Snapshot(str(path)).restore(_app_state(self.state))
