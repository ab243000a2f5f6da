"""Torch's own reader finds everything in a folder that several ranks wrote, in any other layout too."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from aiockpt.planning.local import Entry
from aiockpt.planning.placings import Placing, replicated
from aiockpt.planning.sharding import Cut, Sharding, shard_order
from tests.planning.job import Job, State, whole_array

pytest.importorskip("safetensors", reason="safetensors is not installed")
fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg", reason="torch has no fake process group")

RANKS = (0, 1, 2, 3)
PLACINGS: dict[str, Placing] = {
    "rows": Sharding((4,), RANKS, (Cut(0, 0),)),
    "columns": Sharding((4,), RANKS, (Cut(0, 1),)),
    "both": Sharding((2, 2), RANKS, (Cut(0, 0), Cut(1, 1))),
    "ordered": Sharding((2, 2), RANKS, tuple(shard_order((2, 2), [(0, 2), (0, 1)]))),
    "strided": Sharding((4,), RANKS, (Cut(0, 0, 2),)),
    "hybrid": Sharding((2, 2), RANKS, (Cut(1, 0),)),
    "replicated": replicated(4),
    "undeclared": None,
}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}


def entries() -> list[Entry]:
    found = [
        Entry(("model", f"{name}.{dtype}"), dtype, (9, 5), "", placing)
        for name, placing in PLACINGS.items()
        for dtype in DTYPES
    ]
    rows = PLACINGS["rows"]
    found.append(Entry(("model", "uneven"), "F32", (3, 2), "", rows))
    found.append(Entry(("model", "scalar"), "F32", (), "", replicated(4)))
    found.append(Entry(("model", "empty"), "F32", (0, 2), "", rows))
    return found


def tensor_of(entry: Entry) -> torch.Tensor:
    content = torch.frombuffer(bytearray(whole_array(entry).tobytes()) or bytearray(8), dtype=torch.uint8)
    return content.view(DTYPES[entry.dtype])[: torch.Size(entry.shape).numel()].reshape(entry.shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("step")
    job = Job(4, lambda rank: State(entries()))
    job.write(path)
    return path / "model"


@contextmanager
def as_rank(rank: int, world: int) -> Iterator[None]:
    """Be one of several ranks as far as DTensor can tell."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=fake_pg.FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def load(state: dict[str, torch.Tensor], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit by bit: any bytes are in it, NaNs too."""
    return a.shape == b.shape and a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))


def test_into_plain_tensors(folder: Path) -> None:
    """Whole tensors out of the parts of four ranks."""
    state = {entry.segments[1]: torch.zeros(entry.shape, dtype=DTYPES[entry.dtype]) for entry in entries()}
    load(state, folder)
    for entry in entries():
        assert same(state[entry.segments[1]].reshape(-1), tensor_of(entry).reshape(-1)), entry.segments


@pytest.mark.parametrize("world", [4, 3, 2])
@pytest.mark.parametrize("dim", [0, 1])
def test_into_sharded_tensors(folder: Path, world: int, dim: int) -> None:
    """Each rank of the same or of another world gets its shard, cut as it was or in the other dimension."""
    wanted = [entry for entry in entries() if len(entry.shape) == 2]
    for rank in range(world):
        with as_rank(rank, world):
            mesh = init_device_mesh("cpu", (world,))
            state: dict[str, torch.Tensor] = {}
            for entry in wanted:
                empty = torch.zeros(entry.shape, dtype=DTYPES[entry.dtype])
                local = _shard(empty, dim, rank, world).clone()
                state[entry.segments[1]] = DTensor.from_local(
                    local, mesh, [Shard(dim)], run_check=False, shape=empty.shape, stride=empty.stride()
                )
            load(state, folder)
            for entry in wanted:
                found = state[entry.segments[1]]
                assert isinstance(found, DTensor)
                assert same(found.to_local().reshape(-1), _shard(tensor_of(entry), dim, rank, world).reshape(-1))


def _shard(tensor: torch.Tensor, dim: int, rank: int, world: int) -> torch.Tensor:
    length = -(-tensor.shape[dim] // world)
    start = min(rank * length, tensor.shape[dim])
    return tensor.narrow(dim, start, min(length, tensor.shape[dim] - start))
