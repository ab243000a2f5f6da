"""Run directories to look at."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import aiockpt.blocking


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps 0, 5 and 10; nobody changes it."""
    run = tmp_path_factory.mktemp("saved") / "run"
    with aiockpt.blocking.Checkpointer(run) as checkpointer:
        for step in (0, 5, 10):
            state = {"model": {"weight": torch.full((300, 1000), float(step))}, "progress": {"step": step}}
            checkpointer.save(step, state).result()
    return run


@pytest.fixture
def run_directory(saved_run: Path, tmp_path: Path) -> Path:
    """A copy of that run, for the test alone."""
    return Path(shutil.copytree(saved_run, tmp_path / "run"))


class Block(nn.Module):
    """A layer with parts that are alike in every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.expand = nn.Linear(8, 32)


class Model(nn.Module):
    """Four layers between an embedding and a head that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.tokens.weight


@pytest.fixture(scope="session")
def trained_run() -> Iterator[Path]:
    """A run with steps 100 and 200 of a model and its optimizer; nobody changes it.

    Its path is short, wherever the tests run: it stands on screens of 80 columns.
    """
    with tempfile.TemporaryDirectory(prefix="aiockpt-") as directory:
        yield _trained(Path(directory, "run"))


def _trained(run: Path) -> Path:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
    data = {"order": torch.arange(20), "seen": torch.tensor(0)}
    with aiockpt.blocking.Checkpointer(run) as checkpointer:
        for step in (100, 200):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            data["seen"] += step
            state = {"model": model, "optimizer": optimizer, "data": data, "progress": {"step": step, "epoch": 1}}
            if step == 200:
                state["ema"] = model.state_dict()
                data["order"] = torch.arange(10)
            checkpointer.save(step, state, metadata={"loss": step / 8}).result()
    return run
