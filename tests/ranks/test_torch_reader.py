"""Torch's own reader takes what the ranks of an FSDP2 job saved, in the layout of the job and in others."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.ranks.conftest import Start

pytestmark = pytest.mark.process

COMMON = """
    import torch.distributed.checkpoint as dcp
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    run = args[0]

    def make(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Embedding(30, 12), nn.Linear(12, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))
        model.register_buffer("table", torch.arange(5.0) + seed)
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(model[1], mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def full(tensor):
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def check(state):
        expected = torch.load(run + "/whole.pt")
        assert state.keys() == expected.keys()
        for name, tensor in state.items():
            assert torch.equal(full(tensor), expected[name]), name

    def load(state):
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(run + "/step-7/model"))
        check(state)
"""

SAVE = """
    model = make(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    with aiockpt.blocking.Checkpointer(run) as ckpt:
        ckpt.save(7, {"model": model, "optimizer": optimizer, "rng": aiockpt.RNG()})
    whole = {name: full(tensor).detach() for name, tensor in model.state_dict().items()}
    if rank == 0:
        torch.save(whole, run + "/whole.pt")
"""

SAME = """
    load(make(1).state_dict())
"""

OTHER_DIMENSION = """
    whole = {name: full(tensor).detach() for name, tensor in make(1).state_dict().items()}
    mesh = init_device_mesh("cpu", (world,))
    load({name: distribute_tensor(tensor, mesh, [Shard(tensor.dim() - 1)]) for name, tensor in whole.items()})
"""


@pytest.fixture
def run(start: Start, tmp_path: Path) -> Path:
    """Saved by four ranks, with parts of unequal length."""
    start(4, COMMON + SAVE, tmp_path / "run").check()
    return tmp_path / "run"


def test_with_and_without_resharding(run: Path, start: Start) -> None:
    """Into FSDP2 on as many ranks, on fewer and on more, and cut in another dimension."""
    assert len(list((run / "step-7/model").glob("*-of-00004.safetensors"))) == 4
    for world in (4, 2, 3, 6):
        start(world, COMMON + SAME, run).check()
    start(4, COMMON + OTHER_DIMENSION, run).check()


def test_into_plain_tensors_of_one_process(run: Path) -> None:
    """Without a process group."""
    expected = torch.load(run / "whole.pt")
    state = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(run / "step-7/model")))
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
