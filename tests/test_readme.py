"""README keeps its word: its code runs, and its commands are the ones that CI runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

import aiockpt
from tests.elastic import functions
from tests.markdown import blocks
from tests.support import Training

BLOCKS = blocks("README.md", "python")


def names_of_the_reader(training: Training) -> dict[str, Any]:
    """What README's code takes for granted."""
    return {
        "model": training.model,
        "optimizer": training.optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(training.optimizer, 10),
        "progress": {"epoch": 0},
        "state": training.state,
        "steps": 5,
        "train_step": training.step,
    }


@pytest.mark.process
def test_the_async_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block defines a main() that trains, saves the last step, and resumes."""
    monkeypatch.chdir(tmp_path)
    names = BLOCKS[0].run(**names_of_the_reader(Training()))
    asyncio.run(names["main"]())
    asyncio.run(names["main"]())
    assert aiockpt.blocking.steps("runs/exp1") == [4]


@pytest.mark.process
def test_the_blocking_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second block is a classic loop."""
    monkeypatch.chdir(tmp_path)
    BLOCKS[1].run(**names_of_the_reader(Training()))
    assert aiockpt.blocking.steps("runs/exp1") == []


@pytest.mark.process
def test_the_code_that_supervises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third block runs a function in two processes, and their values come back."""
    monkeypatch.chdir(tmp_path)
    names = BLOCKS[2].run(train=functions.echo)
    result = asyncio.run(names["supervise"]())
    assert result.return_values == {0: "a", 1: "b"}


def test_the_commands() -> None:
    """Both install torch by the exact pin before anything that depends on it."""
    commands = [block.code.rstrip() for block in blocks("README.md", "sh")]
    assert len(commands) == 2
    for command in commands:
        assert "\n" not in command
        assert command.index("torch==2.13.0") < command.index('".[')
