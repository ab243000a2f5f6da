"""torch.distributed.checkpoint: save, load."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from bench.entrant import DONE, Pending, Restorer, Saver

__all__ = ["DcpLoad", "DcpSave", "quiet"]


def quiet() -> None:
    """Hide what DCP warns of on one process without a process group: that this is what it is."""
    warnings.filterwarnings("ignore", module=r"torch\.distributed\..*")


class DcpSave(Saver):
    """dcp.save on one process; its FileSystemWriter fsyncs its files by default."""

    def open(self) -> None:
        """Nothing to open."""
        quiet()

    def begin(self, step: int) -> Pending:
        """Save in the calling thread: it is blocked until the files are durable."""
        save(self.state.state_dict(), checkpoint_id=self.path(step))
        return DONE


class DcpLoad(Restorer):
    """dcp.load on one process."""

    WRITER = DcpSave

    def restore(self, path: Path) -> None:
        """Load in place, into the tensors of the live state."""
        load(self.state.state_dict(), checkpoint_id=path)
