"""torch.distributed.checkpoint.async_save in a thread."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save

from bench.entrant import Pending, Saver
from bench.peers.dcp_sync import quiet
from bench.peers.futures import FuturePending

__all__ = ["DcpThread", "DcpThreadKeptStager", "upload"]


def upload(answer: Future[Any] | AsyncSaveResponse) -> FuturePending:
    """Return the save whose end is that of the files' sync; asynchronous stagers answer with two futures."""
    return FuturePending(answer.upload_completion if isinstance(answer, AsyncSaveResponse) else answer)


class DcpThread(Saver):
    """The documented call, which copies the state into fresh memory at each save."""

    stager: DefaultStager | None = None

    def open(self) -> None:
        """Nothing to open."""
        quiet()

    def begin(self, step: int) -> Pending:
        """Save; the call returns when the state is copied, the future when its files are synced."""
        return upload(
            async_save(self.state.state_dict(), checkpoint_id=self.path(step), async_stager=self.stager, no_dist=True)
        )

    def close(self) -> None:
        """Close the stager, where there is one."""
        if self.stager is not None:
            self.stager.close()


class DcpThreadKeptStager(DcpThread):
    """The same with a stager that keeps its memory from save to save."""

    def open(self) -> None:
        """Make the stager."""
        super().open()
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
        )
