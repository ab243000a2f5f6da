"""The states of a job of several ranks: sharded over them as FSDP2 does, or replicated as under DDP."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bench.state import Training, make_gpt

__all__ = ["make_rank_state"]


class _Replicated(Training):
    """Every rank has all of it, and says so by the wrapper."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(model, optimizer)
        self._wrapped = DistributedDataParallel(model)

    @property
    def mapping(self) -> dict[str, Any]:
        """The live objects, the model as training holds it."""
        return {"model": self._wrapped, "optimizer": self.optimizer}


def make_rank_state(kind: str, nbytes: int) -> Training:
    """Return this rank's part of a GPT with AdamW of ``nbytes``; every rank of the default group calls it.

    Args:
        kind: ``sharded`` or ``replicated``.
        nbytes: Of the whole, on all ranks together where it is sharded.
    """
    torch.manual_seed(0)
    model = make_gpt(nbytes, "cpu")
    made: type[Training] = _Replicated
    if kind == "sharded":
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        made = Training
    return made(model, torch.optim.AdamW(model.parameters(), lr=1e-6))
