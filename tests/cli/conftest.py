"""A run directory to look at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import aiockpt.blocking


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """A run with steps 0, 5 and 10."""
    run = tmp_path / "run"
    with aiockpt.blocking.Checkpointer(run) as checkpointer:
        for step in (0, 5, 10):
            state = {"model": {"weight": torch.full((300, 1000), float(step))}, "progress": {"step": step}}
            checkpointer.save(step, state).result()
    return run
