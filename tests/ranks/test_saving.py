"""Ranks save together through their workers, and restore what they saved."""

from __future__ import annotations

from pathlib import Path

import pytest

import aiockpt
from tests.ranks.conftest import Start

pytestmark = pytest.mark.process

PLAIN = """
    import logging
    logging.basicConfig(level=logging.INFO)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)

    def step():
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * 0.5
        optimizer.step()

    state = {"model": model, "optimizer": optimizer, "rng": aiockpt.RNG(), "progress": {"epoch": 3}}
"""


def test_ranks_save_one_checkpoint_together(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start(
        4,
        PLAIN
        + """
    with aiockpt.blocking.Checkpointer(args[0]) as ckpt:
        assert ckpt.restore(state) is None
        for number in (1, 2):
            step()
            saved = ckpt.save(number, state).result()
            print(saved.step, saved.path)
    """,
        run,
    )
    job.check()
    assert aiockpt.blocking.steps(run) == [1, 2]
    for rank in range(4):
        assert job.out(rank) == [f"{step} {run}/step-{step}" for step in (1, 2)]
    loaded = aiockpt.blocking.load(run)
    assert loaded["progress"] == {"epoch": 3}
