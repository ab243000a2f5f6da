"""torch.distributed.checkpoint.async_save in a process, through shared memory."""

from __future__ import annotations

import os

from torch import distributed
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

from bench.entrant import Pending, Saver
from bench.peers.dcp_sync import quiet
from bench.peers.dcp_thread import upload

__all__ = ["DcpAmongRanks", "DcpProcess"]


class DcpProcess(Saver):
    """The process-based save with a stager that keeps its shared memory; it wants a process group."""

    def open(self) -> None:
        """Make a group of one and the stager."""
        quiet()
        os.environ.setdefault(
            "MASTER_ADDR", "127.0.0.1"
        )  # else DCP asks for the host's full name, which may not resolve
        distributed.init_process_group(
            "gloo", init_method=(self.directory / "rendezvous").as_uri(), rank=0, world_size=1
        )
        self._make_stager()

    def _make_stager(self) -> None:
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=True,
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
        )

    def begin(self, step: int) -> Pending:
        """Save; the call returns when the state is in shared memory, the future when the files are synced."""
        return upload(
            async_save(
                self.state.state_dict(),
                checkpoint_id=self.path(step),
                async_checkpointer_type=AsyncCheckpointerType.PROCESS,
                async_stager=self.stager,
            )
        )

    def close(self) -> None:
        """Close stager and group; the process ends with ours."""
        self.stager.close()
        distributed.destroy_process_group()


class DcpAmongRanks(DcpProcess):
    """The same in a job of several ranks, whose group is there."""

    def open(self) -> None:
        """Make the stager."""
        quiet()
        self._make_stager()

    def close(self) -> None:
        """Close the stager."""
        self.stager.close()
