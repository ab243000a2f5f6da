"""Ranks that read beside a job, without a writer: each for itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks.conftest import Start
from tests.restoring.ranked import by_dim, write_ranks

pytestmark = pytest.mark.process

READ = """
    state = {"model": {"w": torch.zeros(6)}, "own": -1}
    restored = aiockpt.blocking.restore(args[0], state)
    assert restored.step == 1
    assert state["own"] == rank
    assert torch.equal(state["model"]["w"], torch.arange(6.0))
"""


def test_each_takes_what_its_rank_of_the_default_group_saved(start: Start, tmp_path: Path) -> None:
    states = [{"model": {"w": torch.arange(6.0)}, "own": rank} for rank in range(2)]
    write_ranks(tmp_path / "run", states, by_dim(0, 2), own=["own"])
    start(2, READ, tmp_path / "run").check()
