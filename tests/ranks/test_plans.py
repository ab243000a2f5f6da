"""Plans of real ranks: what is sent of them when one changes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import aiockpt
from tests.ranks.conftest import Start

pytestmark = pytest.mark.process


def test_a_plan_that_changed_on_one_rank_alone_is_sent_alone(start: Start, tmp_path: Path) -> None:
    """All ranks send one in the first save; then who changed sends its own, and all of them are merged again."""
    run = tmp_path / "run"
    job = start(
        4,
        """
    from tests.ranks.at_rank import *
    from tests.ranks.telling_worker import TELLING
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    mesh = init_device_mesh("cpu", (4,))

    def make(shift, own):
        state = {
            "sharded": {"w": distribute_tensor(torch.arange(16.0) + shift, mesh, [Shard(0)])},
            "own": aiockpt.PerRank({"history": torch.full((own,), float(rank))}),
            "same": torch.ones(5) * shift,
        }
        if rank == 2 and shift:
            state["stage"] = {"w": torch.full((3,), 7.0 + shift), "note": shift}
        return state

    def save(step, shift, own):
        ckpt.save(step, make(shift, own)).result()
        say(f"plan {step}", ckpt._coordinator.saving.plans._plan.digest)
        say(f"replanned {step}", ckpt.statistics().plans)

    ckpt = checkpointer(args[0])
    ckpt._coordinator.worker_faults = TELLING
    with ckpt:
        save(0, 0, own=1)
        save(1, 1, own=1)  # rank 2 has one tensor and one value more
        save(2, 2, own=1 if rank != 1 else 4)  # rank 1 has more of its own
        save(3, 3, own=1 if rank != 1 else 4)
        for step in (1, 3):
            live = make(9, 1 if rank != 1 or step == 1 else 4)
            live["own"].value["history"].zero_()
            ckpt.restore(live, step=step, strict=False)  # only rank 2 has a stage to restore
            assert torch.equal(live["sharded"]["w"].full_tensor(), torch.arange(16.0) + step)
            assert live["own"].value["history"].eq(rank).all()
            assert live["same"].eq(step).all()
            if rank == 2:
                assert live["stage"]["w"].eq(7 + step).all() and live["stage"]["note"] == step
    """,
        run,
    )
    job.check()
    told = job.told()
    first, alone = told["plan 0"][0], told["plan 1"][2]
    assert told["plan 0"] == [first] * 4
    assert alone != first
    for step in (1, 2, 3):
        assert told[f"plan {step}"] == [first, first, alone, first], "what a rank has for itself is in no plan"
    assert told["replanned 1"] == [1, 1, 2, 1]
    assert told["replanned 3"] == [1, 2, 2, 1]
    sent = [digest for rank in range(4) for digest in re.findall(r"sends plan (\w+)", job.err(rank))]
    assert sorted(sent) == sorted([first, alone])
    assert re.findall(r"sends plan (\w+)", job.err(2))[-1] == alone
    for step in (0, 3):
        loaded = aiockpt.blocking.load(run, step=step)
        assert loaded["sharded"]["w"].tolist() == [i + step for i in range(16)]
        assert ("stage" in loaded) == bool(step)
    assert loaded["stage"]["w"].tolist() == [10.0] * 3
    assert loaded["stage"]["note"] == 3
