"""What several ranks hold: written once where it is equal, told where it is not, and shared out evenly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import aiockpt
from tests.ranks.conftest import Start

pytestmark = pytest.mark.process

COMMON = """
    import time
    from tests.ranks.at_rank import *
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
"""


def told_by_all(told: list[Any], *words: str, keys: tuple[str, ...], ranks: tuple[int, ...]) -> None:
    """See that all ranks got one PlanMismatchError with these words."""
    for one in told:
        assert isinstance(one, dict), told
        assert one["error"] == "PlanMismatchError", one
        assert tuple(one["keys"]) == keys, one
        assert tuple(one["ranks"]) == ranks, one
        for word in words:
            assert word in one["text"], one


def test_what_nobody_declared(start: Start, tmp_path: Path) -> None:
    """Equal on all ranks it is written once; what differs is named with its ranks, and what to do with it."""
    run = tmp_path / "run"
    job = start(
        4,
        COMMON
        + """
    mesh = init_device_mesh("cpu", (world,))
    with checkpointer(args[0]) as ckpt:
        def save(name, step, state):
            say(name, of(lambda: ckpt.save(step, state).result()))
            dist.barrier()

        same = {"top": torch.arange(1000.0), "a/b": {"w": torch.ones(2000)}, "epoch": 3}
        save("equal", 0, same)
        save("top", 1, same | {"top": torch.arange(1000.0) + (rank == 2)})
        save("tensor", 2, same | {"a/b": {"w": torch.ones(2000) * (1 + rank // 2)}})
        save("state", 3, {"state": {"w": torch.ones(9)}, "top": torch.ones(9) * (1 + rank // 3)})
        save("value", 4, same | {"epoch": 3 + rank // 3})
        save("per rank", 5, same | {"epoch": aiockpt.PerRank(rank), "w": aiockpt.PerRank(torch.full((5,), rank))})
        save("dtype", 6, same | {"top": torch.arange(1000.0).to(torch.float64 if rank == 1 else torch.float32)})
        save("shape", 7, same | {"top": torch.arange(1000.0 + rank // 3)})
        whole = torch.arange(8.0)
        cut = distribute_tensor(whole, mesh, [Shard(0)])
        save("placement", 8, {"w": cut if rank != 3 else whole})
        # Each stage of a pipeline has layers of its own: fine. So have experts, if their names say so.
        save("stages", 9, {"layers": {f"{rank // 2}": torch.full((10,), rank // 2)}})
        save("experts", 10, {"expert": {"w": torch.full((10,), float(rank))}})
        save("overlap", 11, {"layers": {str(rank): torch.ones(4), str(rank + 1): torch.full((4,), float(rank // 3))}})
        save("after", 12, same)
    """,
        run,
    )
    job.check()
    told = job.told()
    assert told["equal"] == [0] * 4
    assert sorted(path.relative_to(run / "step-0").as_posix() for path in run.glob("step-0/*/*.safetensors")) == [
        "a%2Fb/model-00001-of-00004.extra.safetensors",
        "state/model-00001-of-00004.extra.safetensors",
    ]
    told_by_all(told["top"], "PerRank", "rank 2", keys=("top",), ranks=(2,))
    told_by_all(told["tensor"], "PerRank", "rank 2", keys=("a/b.w",), ranks=(2,))
    told_by_all(told["state"], "PerRank", keys=("top",), ranks=(3,))
    told_by_all(told["value"], "PerRank", "rank 3", keys=("epoch",), ranks=(3,))
    assert told["per rank"] == [5] * 4
    told_by_all(told["dtype"], "rank 1", keys=("top",), ranks=(1,))
    told_by_all(told["shape"], "rank 3", keys=("top",), ranks=(3,))
    told_by_all(told["placement"], "rank 3", keys=("w",), ranks=(3,))
    assert told["stages"] == [9] * 4
    told_by_all(told["experts"], "PerRank", keys=("expert.w",), ranks=(1, 2, 3))
    told_by_all(told["overlap"], "PerRank", keys=("layers.1", "layers.2", "layers.3"), ranks=(1, 2, 3))
    assert told["after"] == [12] * 4
    stages = aiockpt.blocking.load(run, step=9)["layers"]
    assert {name: tensor[0].item() for name, tensor in stages.items()} == {"0": 0, "1": 1}


@pytest.mark.parametrize("how", ["globs", "ddp"])
def test_replicas(how: str, start: Start, tmp_path: Path) -> None:
    """Each rank stages its share; nobody waits for another; one that drifted is found within 8 saves, and named."""
    run = tmp_path / "run"
    job = start(
        4,
        COMMON
        + """
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 48 + 16 * i) for i in range(6)))
    if args[1] == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0.5
    optimizer.step()
    state = {"model": model, "optimizer": optimizer}
    globs = ["model.*", "optimizer.*"] if args[1] == "globs" else []
    with checkpointer(args[0], replicated=globs, snapshot="inline") as ckpt:
        ckpt.save(0, state).result()
        say("staged", ckpt.statistics().staged_nbytes)
        tensors = [*model.parameters(), *(value for one in optimizer.state.values() for value in one.values())]
        say("all", [tensor.nbytes for tensor in tensors])
        dist.barrier()

        # Rank 1 calls when rank 0's call has returned, and not before.
        returned = dist.new_group([0, 1])
        if rank == 1:
            dist.barrier(returned)
        save = ckpt.save(1, state)
        if rank == 0:
            say("phase", save.phase)
            dist.barrier(returned)
        say("saved", of(save.result))

        if rank == 2:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.001)
        found = []
        for step in range(2, 10):
            found.append(of(ckpt.save(step, state).result))
            if isinstance(found[-1], dict):
                break
        say("drifted", found)
        say("after", len(found))
    """,
        run,
        how,
    )
    job.check()
    told = job.told()
    sizes, staged = told["all"][0], told["staged"]
    mean, largest = sum(sizes) / 4, max(sizes)
    assert all(nbytes <= mean + largest for nbytes in staged), (staged, mean, largest)
    assert sum(sizes) <= sum(staged) <= 1.05 * sum(sizes)  # each byte once, but for some of each rank's own
    assert told["phase"][0] in ("planned", "staging", "staged", "written")  # not committing
    assert told["saved"] == [1] * 4
    drifted = [found[-1] for found in told["drifted"]]
    for one in drifted:
        assert one["error"] == "PlanMismatchError", told["drifted"]
        assert one["ranks"] == [2]
        assert all(key.startswith("model.") for key in one["keys"])
        assert "drifted apart" in one["text"]
    assert len(set(told["after"])) == 1
    loaded = aiockpt.blocking.load(run, step=1)
    assert all(isinstance(tensor, torch.Tensor) for tensor in loaded["model"].values())
