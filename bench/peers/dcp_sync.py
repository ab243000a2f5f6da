"""torch.distributed.checkpoint: save, load."""

from __future__ import annotations

import warnings

from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from bench.entrant import Entrant, SaveTimes, stopwatch

__all__ = ["DcpSave", "quiet"]


def quiet() -> None:
    """Hide what DCP warns of on one process without a process group: that this is what it is."""
    warnings.filterwarnings("ignore", module=r"torch\.distributed\..*")


class DcpSave(Entrant):
    """dcp.save on one process; its FileSystemWriter fsyncs its files by default."""

    def open(self) -> None:
        """Nothing to open."""
        quiet()

    def save(self, step: int) -> SaveTimes:
        """Save in the calling thread: it is blocked until the files are durable."""
        elapsed = stopwatch()
        save(self.state.state_dict(), checkpoint_id=self.path(step))
        done = elapsed()
        return SaveTimes(done, done, done)

    def restore(self) -> None:
        """Load in place, into the tensors of the live state."""
        load(self.state.state_dict(), checkpoint_id=self.path(0))
