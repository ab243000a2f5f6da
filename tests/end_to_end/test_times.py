"""Bounds in time: exactly under ``-m timing``, run alone; with ten times the slack beside other tests."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from aiockpt import blocking

pytestmark = pytest.mark.process

SLACKS = [pytest.param(1.0, marks=pytest.mark.timing, id="exact"), pytest.param(10.0, id="with-slack")]


def gpt_like(nbytes: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A stack of linear layers under AdamW that has stepped once, with about ``nbytes`` of state."""
    width, layers = 512, max(1, nbytes // (12 * 512 * 512 * 12))
    model = nn.ModuleList([nn.Linear(width, 12 * width) for _ in range(layers)])
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()


@pytest.mark.parametrize("slack", SLACKS)
def test_a_guarded_save_returns_at_once(slack: float, tmp_path: Path) -> None:
    """At most 10 ms, once an optimizer has stepped under the guard."""
    model, optimizer = gpt_like(128 << 20)
    state = {"model": model, "optimizer": optimizer}
    blocked = []
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.prepare(state)
        for step in range(6):
            save = ckpt.save(step, state)
            save.result(60)
            blocked.append(save.timings["blocked"])
            train(model, optimizer)
    assert statistics.median(blocked[1:]) <= 0.010 * slack


@pytest.mark.parametrize("slack", SLACKS)
def test_the_worker_is_ready_soon(slack: float, tmp_path: Path) -> None:
    """``open()``, most of which is the worker's start, takes at most 0.5 s."""
    taken = []
    for turn in range(3):
        began = time.perf_counter()
        with blocking.Checkpointer(tmp_path / str(turn)):
            taken.append(time.perf_counter() - began)
    assert min(taken) <= 0.5 * slack


@pytest.mark.parametrize("slack", SLACKS)
def test_ten_thousand_small_tensors(slack: float, tmp_path: Path) -> None:
    """All inline: ``save()`` returns within 60 ms, durable within 150 ms."""
    state = {"small": {f"t{i}": torch.full((1024,), float(i)) for i in range(10_000)}}
    blocked, durable = [], []
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.prepare(state)
        for step in range(5):
            timings = ckpt.save(step, state).result(60).timings
            blocked.append(timings["blocked"])
            durable.append(timings["durable"])
    assert statistics.median(blocked[1:]) <= 0.060 * slack
    assert statistics.median(durable[1:]) <= 0.150 * slack
