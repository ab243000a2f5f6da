"""torch.distributed.checkpoint.async_save with stagers that only a GPU has a use for."""

from __future__ import annotations

from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save

from bench.entrant import Pending
from bench.peers.dcp_process import DcpProcess
from bench.peers.dcp_sync import quiet
from bench.peers.dcp_thread import DcpThread
from bench.peers.futures import FuturePending

__all__ = ["DcpProcessPinned", "DcpThreadPinned"]


def _both(answer: object) -> Pending:
    """Return the save that is staged when the one future is done, and durable when the other is."""
    assert isinstance(answer, AsyncSaveResponse)
    staging = answer.staging_completion
    return FuturePending(answer.upload_completion, lambda: staging.result())


class DcpThreadPinned(DcpThread):
    """A stager that copies on a stream of its own into pinned memory that it keeps; a thread writes."""

    def open(self) -> None:
        """Make the stager."""
        quiet()
        self.stager = DefaultStager(StagingOptions(use_shared_memory=False))

    def begin(self, step: int) -> Pending:
        """Save; the state may change when the stager says so."""
        return _both(
            async_save(self.state.state_dict(), checkpoint_id=self.path(step), async_stager=self.stager, no_dist=True)
        )


class DcpProcessPinned(DcpProcess):
    """The default stager: pinned shared memory, copied into on a stream of its own; a process writes."""

    def open(self) -> None:
        """Make a group of one and the stager."""
        super().open()
        self.stager.close()
        self.stager = DefaultStager(StagingOptions())

    def begin(self, step: int) -> Pending:
        """Save; the state may change when the stager says so."""
        return _both(
            async_save(
                self.state.state_dict(),
                checkpoint_id=self.path(step),
                async_checkpointer_type=AsyncCheckpointerType.PROCESS,
                async_stager=self.stager,
            )
        )
