"""Every layout against the bytes of the full tensor, on 4 ranks."""

from __future__ import annotations

import pytest

from tests.ranks.conftest import Start

pytestmark = pytest.mark.process

CHECK = """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard
    from aiockpt.state.sharded import read_sharded

    def check(full, tensor, what):
        sharded = read_sharded(tensor, ("x",))
        assert sharded.shape == tuple(full.shape), what
        covered = torch.zeros_like(sharded.local, dtype=torch.bool)
        for chunk in sharded.sharding.chunks(sharded.shape, sharded.coordinate):
            mine = tuple(slice(o, o + n) for o, n in zip(chunk.local_offsets, chunk.shape))
            there = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.shape))
            assert torch.equal(sharded.local[mine], full[there]), (what, chunk)
            covered[mine] = True
        assert covered.all(), what
"""


def test_layouts_are_those_of_the_bytes(start: Start) -> None:
    """Even, uneven and empty shards; one and two mesh dimensions; replicas among them."""
    job = start(
        4,
        CHECK
        + """
    meshes = [init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2)), init_device_mesh("cpu", (4, 1))]
    kinds = [Replicate(), Shard(0), Shard(1)]
    for mesh in meshes:
        for shape in [(8, 8), (7, 5), (3, 9), (1, 2), (5, 0)]:
            full = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape)
            for first in kinds:
                for second in kinds if mesh.ndim == 2 else [None]:
                    placements = [first] + ([second] if second is not None else [])
                    check(full, distribute_tensor(full, mesh, placements), (mesh, shape, placements))
    print("done")
    """,
    )
    job.check()


def test_fsdp2_over_tensor_parallelism(start: Start) -> None:
    """What ``fully_shard`` makes of a parallelised module, sizes that do not divide among it."""
    job = start(
        4,
        CHECK
        + """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for width, hidden in [(8, 16), (8, 6), (12, 20), (4, 4)]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(width, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, width))
        full = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        for name, tensor in model.state_dict().items():
            check(full[name], tensor, (name, tensor.placements))
    print("done")
    """,
    )
    job.check()


def test_hsdp(start: Start) -> None:
    """Shards on one mesh dimension, replicas on the other."""
    job = start(
        4,
        CHECK
        + """
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    model = torch.nn.Linear(7, 5)
    full = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fully_shard(model, mesh=mesh)
    for name, tensor in model.state_dict().items():
        check(full[name], tensor, (name, tensor.placements))
        sharding = read_sharded(tensor, ("x",)).sharding
        assert sharding.replicas == 2, sharding
    """,
    )
    job.check()


def test_what_has_no_rule_is_refused(start: Start) -> None:
    """Partial sums, custom placements, a local tensor of another shape, a mesh without this rank."""
    job = start(
        4,
        CHECK
        + """
    from torch.distributed.device_mesh import DeviceMesh
    mesh = init_device_mesh("cpu", (4,))
    def refused(tensor):
        try:
            read_sharded(tensor, ("model", "w"))
        except aiockpt.UnsupportedValueError as exc:
            assert exc.key == "model.w", exc
            print(exc.why.split(":")[0])
        else:
            raise AssertionError(tensor)
    refused(DTensor.from_local(torch.ones(4), mesh, [Partial()], run_check=False))
    refused(DTensor.from_local(torch.ones(rank + 1), mesh, [Shard(0)], run_check=False, shape=(20,), stride=(1,)))
    class Mine(Shard):
        pass
    refused(DTensor.from_local(torch.ones(4), mesh, [Mine(0)], run_check=False))
    half = DeviceMesh("cpu", [0, 1])
    if rank > 1:
        refused(DTensor.from_local(torch.ones(4), half, [Replicate()], run_check=False))
    dist.barrier()  # rank 0 serves the store, and some are still making the group of the half mesh
    """,
    )
    job.check()
