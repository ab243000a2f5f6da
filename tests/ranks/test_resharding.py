"""A real state on DTensors, saved by some ranks and restored by others."""

from __future__ import annotations

from pathlib import Path

import pytest

import aiockpt
from tests.ranks.conftest import Start

pytestmark = pytest.mark.process

COMMON = """
    import pathlib
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
    )
    from tests.restoring.ranked import save_together
    from tests.restoring.restoring import restore
    run = pathlib.Path(args[0])

    def make(seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(
            torch.nn.Linear(6, 10), torch.nn.ReLU(), torch.nn.LayerNorm(10), torch.nn.Linear(10, 3, bias=False)
        )
        model.register_buffer("table", torch.randn(5))
        return model

    def plain(seed):
        return make(seed)

    def fsdp(seed):
        model = make(seed)
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def tp(seed):
        model = make(seed)
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": SequenceParallel(), "3": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        return model

    def norm_beside_tp(seed):
        # What is outside of the plan has one mesh for each place along "tp": they are slices of one.
        model = make(seed)
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "3": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        return model

    def hsdp(seed):
        model = make(seed)
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
        return model

    def optimizer_of(model, reverse=False):
        params = list(model.parameters())
        return torch.optim.AdamW(params[::-1] if reverse else params, lr=0.1, foreach=False)

    def full(tensor):
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def write(model, optimizer):
        # Gradients that depend on the whole parameter alone, so that all layouts get the same state.
        for param in model.parameters():
            param.grad = param.detach() * 0.5
        optimizer.step()
        optimizer.step()
        save_together(run, {"model": model, "optimizer": optimizer, "epoch": 3})
        whole = wholes(model, optimizer)
        if rank == 0:
            torch.save(whole, run / "whole.pt")
        dist.barrier()

    def wholes(model, optimizer):
        found = {name: full(tensor.detach()) for name, tensor in model.state_dict().items()}
        for name, param in model.named_parameters():
            for key, item in optimizer.state[param].items():
                found[f"{name}/{key}"] = full(item)
        return found

    def check(model, optimizer):
        expected = torch.load(run / "whole.pt")
        found = wholes(model, optimizer)
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
            assert found[name].dtype == tensor.dtype, name
"""

WRITE = """
    model = {make}(0)
    write(model, optimizer_of(model))
"""

WRITE_TOGETHER = """
    step = args[1]
    model = {make}(step)
    optimizer = optimizer_of(model)
    number = aiockpt.PerRank({{"rank": -1}})
    state = {{"model": model, "optimizer": optimizer, "number": number, "epoch": step}}
    with aiockpt.blocking.Checkpointer(args[0]) as ckpt:
        # Ranks that the job before did not have find nothing of their own.
        restored = ckpt.restore(state, exclude=["number"] if rank >= 4 else [])
        if step:
            assert restored.step == state["epoch"] == step - 1
            assert number.value["rank"] == (rank if rank < 4 else -1)
            check(model, optimizer)
        number.value["rank"], state["epoch"] = rank, step
        for param in model.parameters():
            param.grad = param.detach() * 0.5
        optimizer.step()
        whole = wholes(model, optimizer)
        dist.barrier()  # all have read the one before
        if rank == 0:
            torch.save(whole, run.with_suffix(".new"))
            run.with_suffix(".new").rename(run / "whole.pt")
        assert ckpt.save(step, state).result().step == step
"""

READ = """
    model = {make}(1)
    before = {{name: (id(tensor), getattr(tensor, "_local_tensor", tensor).data_ptr())
              for name, tensor in model.state_dict(keep_vars=True).items()}}
    optimizer = optimizer_of(model, reverse={reverse})
    if {stepped}:
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    state = {{"model": model, "optimizer": optimizer, "epoch": 0}}
    outcome = restore(run, state, rank=rank)
    assert state["epoch"] == 3
    assert not outcome.missing and not outcome.unexpected
    after = {{name: (id(tensor), getattr(tensor, "_local_tensor", tensor).data_ptr())
             for name, tensor in model.state_dict(keep_vars=True).items()}}
    assert before == after
    for param in model.parameters():
        for key, item in optimizer.state[param].items():
            if key != "step":
                assert isinstance(item, DTensor) == isinstance(param, DTensor)
                assert not isinstance(param, DTensor) or item._spec.placements == param._spec.placements
    check(model, optimizer)
    for param in model.parameters():  # and it trains on
        param.grad = torch.ones_like(param)
    optimizer.step()
"""


def reading(make: str, *, reverse: bool = False, stepped: bool = False) -> str:
    """Return the code of a job that restores."""
    return COMMON + READ.format(make=make, reverse=reverse, stepped=stepped)


@pytest.mark.parametrize(
    ("saved", "readers"),
    [
        ("fsdp", [("fsdp", 1), ("fsdp", 2), ("fsdp", 3), ("fsdp", 4), ("plain", 1), ("tp", 4), ("hsdp", 4)]),
        ("tp", [("tp", 4), ("fsdp", 3), ("plain", 2)]),
        ("hsdp", [("fsdp", 2), ("plain", 1)]),
        ("norm_beside_tp", [("norm_beside_tp", 4), ("fsdp", 2), ("plain", 1)]),
        ("plain", [("fsdp", 3), ("tp", 4)]),
    ],
)
def test_any_layout_into_any_other(start: Start, tmp_path: Path, saved: str, readers: list[tuple[str, int]]) -> None:
    """Four ranks save a model and its AdamW; other ranks with other layouts have every bit of both, in place."""
    run = tmp_path / "run"
    start(4, COMMON + WRITE.format(make=saved), run).check()
    for number, (make, world) in enumerate(readers):
        start(world, reading(make, reverse=number % 2 == 1, stepped=number % 3 == 2), run).check()


def test_a_job_of_eight_goes_on_from_one_of_four(start: Start, tmp_path: Path) -> None:
    """More ranks than wrote it, some with nothing of a tensor: all restore it together, save, and four go on again."""
    run, trained = tmp_path / "run", WRITE_TOGETHER.format(make="fsdp")
    start(4, COMMON + trained, run, 0).check()
    start(8, COMMON + trained, run, 1).check()
    start(4, COMMON + trained, run, 2).check()
    assert aiockpt.blocking.steps(run) == [0, 1, 2]


def test_every_placement_into_every_other(start: Start, tmp_path: Path) -> None:
    """DTensors of the user's own, uneven and empty parts, two mesh dimensions, local memory of any strides."""
    job = start(
        4,
        COMMON
        + """
    meshes = [init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))]
    shapes = [(8, 8), (7, 5), (3, 9), (1, 2), (5, 0), (6, 3, 5)]
    kinds = [Replicate(), Shard(0), Shard(1)]
    layouts = [(meshes[0], [kind]) for kind in kinds]
    layouts += [(meshes[1], [first, second]) for first in kinds for second in kinds]
    wanted = {}
    for number, shape in enumerate(shapes):
        wanted[f"{number}"] = (torch.arange(torch.Size(shape).numel()).reshape(shape) + number).to(torch.bfloat16)
    wanted["complex"] = torch.complex(torch.randn(5, 6), torch.randn(5, 6)).to(torch.complex128)
    dist.broadcast(torch.view_as_real(wanted["complex"]), 0)
    for step, (mesh, placements) in enumerate(layouts, start=1):
        state = {"x": {name: distribute_tensor(full, mesh, placements) for name, full in wanted.items()}}
        save_together(run, state, step=step)
        for mesh, placements in layouts[step % 3::3]:
            live = {}
            for name, full in wanted.items():
                live[name] = distribute_tensor(torch.zeros_like(full), mesh, placements)
                local = live[name]._local_tensor
                if local.dim() == 2 and int(name == "1"):
                    turned = torch.zeros(local.shape[::-1], dtype=local.dtype).t()
                    live[name] = DTensor.from_local(
                        turned, mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
                    )
            before = {name: tensor._version for name, tensor in live.items()}
            restore(run, {"x": live}, step=step, rank=rank)
            for name, full in wanted.items():
                expected = distribute_tensor(full, mesh, placements)._local_tensor
                assert torch.equal(live[name]._local_tensor, expected), (step, mesh, placements, name)
                assert not expected.numel() or live[name]._version > before[name]
    """,
        tmp_path / "run",
    )
    job.check()


def test_a_rank_reads_no_block_that_it_does_not_need(start: Start, tmp_path: Path) -> None:
    """Damage in what other ranks read is not its concern; in what it reads it is, and nothing live was changed."""
    job = start(
        4,
        COMMON
        + """
    mesh = init_device_mesh("cpu", (4,))
    state = {"x": {"w": distribute_tensor(torch.arange(16.0), mesh, [Shard(0)])}}
    save_together(run, state)
    if rank == 0:
        damaged = run / "step-1" / "x" / "model-00003-of-00004.safetensors"
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 1
        damaged.write_bytes(data)
    dist.barrier()
    live = {"x": {"w": distribute_tensor(torch.zeros(16), mesh, [Shard(0)])}}
    try:
        restore(run, live, step=1, rank=rank)
    except aiockpt.CheckpointCorruptError as exc:
        assert rank == 2, exc
        assert exc.file.endswith("x/model-00003-of-00004.safetensors")
        assert not live["x"]["w"]._local_tensor.any()
    else:
        assert rank != 2
        assert torch.equal(live["x"]["w"]._local_tensor, state["x"]["w"]._local_tensor)
    """,
        tmp_path / "run",
    )
    job.check()


def test_what_cannot_be_written_is_said_before_anything_changes(start: Start, tmp_path: Path) -> None:
    """A DTensor of summands has no memory for the whole."""
    job = start(
        2,
        COMMON
        + """
    from torch.distributed.tensor import Partial
    mesh = init_device_mesh("cpu", (2,))
    state = {"x": {"w": torch.ones(4), "v": torch.ones(4)}}
    save_together(run, state)
    live = {"x": {"w": DTensor.from_local(torch.zeros(4), mesh, [Partial()], run_check=False), "v": torch.zeros(4)}}
    try:
        restore(run, live, rank=rank)
    except aiockpt.StateMismatchError as exc:
        assert "x.w" in exc.why and "summands" in exc.why, exc
        assert not live["x"]["v"].any()
    else:
        raise AssertionError("it was taken")
    """,
        tmp_path / "run",
    )
    job.check()
