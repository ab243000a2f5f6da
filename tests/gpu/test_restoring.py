"""Restores into CUDA memory, by way of pinned buffers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

import aiockpt
from aiockpt import blocking
from aiockpt.restoring import destinations
from tests.gpu.scenes import DEVICE, MIB, Scene, busy, live

pytestmark = pytest.mark.gpu


def write(run: Path, state: Mapping[str, Any], step: int = 1) -> None:
    """Save one checkpoint."""
    with blocking.Checkpointer(run) as checkpointer:
        checkpointer.save(step, state).result()


def test_tensors_of_every_layout_are_written_on_the_device(tmp_path: Path) -> None:
    """Contiguous ones block by block on side streams, others by torch; what was enqueued before reads old values."""
    big = torch.randn(9 * MIB)
    saved = {
        "big": big,
        "strided": torch.randn(40, 50),
        "half": torch.randn(7).half(),
        "eighth": torch.randn(700).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 3),
    }
    write(tmp_path / "run", {"t": saved})
    there = {
        "big": torch.zeros(9 * MIB, device=DEVICE),
        "strided": torch.zeros(50, 40, device=DEVICE).t(),
        "half": torch.zeros(7, device=DEVICE).half(),
        "eighth": torch.zeros(700, device=DEVICE).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(0, device=DEVICE),
        "empty": torch.empty(0, 3, device=DEVICE),
    }
    addresses = {key: tensor.data_ptr() for key, tensor in there.items()}
    busy()
    before = there["big"] + 1
    blocking.restore(tmp_path / "run", {"t": there})
    assert before.eq(1).all()
    assert live({"t": there}) == live({"t": saved})
    assert {key: tensor.data_ptr() for key, tensor in there.items()} == addresses


@pytest.mark.parametrize("refused", [False, True])
def test_the_buffers_are_pinned_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    """Each reading thread pins its buffer; where CUDA refuses, the restore is as right."""
    scene = Scene(width=1536)
    scene.train()
    write(tmp_path / "run", scene.state)
    expected = live(scene.state)
    pinned: list[int] = []
    real_pin, real_unpin = destinations.pin, destinations.unpin

    def pin(address: int, nbytes: int, device: torch.device) -> str | None:
        why = "not today" if refused else real_pin(address, nbytes, device)
        if why is None:
            pinned.append(address)
        return why

    def unpin(address: int, device: torch.device) -> bool:
        pinned.remove(address)
        counts.append(address)
        return real_unpin(address, device)

    counts: list[int] = []
    monkeypatch.setattr(destinations, "pin", pin)
    monkeypatch.setattr(destinations, "unpin", unpin)
    scene.train()
    assert live(scene.state) != expected
    blocking.restore(tmp_path / "run", scene.state)
    assert live(scene.state) == expected
    assert pinned == []
    assert bool(counts) is not refused


def test_while_a_copy_is_pending(tmp_path: Path) -> None:
    """``restore`` first waits for the copies of the save before it."""
    scene = Scene()
    with blocking.Checkpointer(tmp_path / "run") as checkpointer:
        for step in range(3):
            scene.train()
            expected = live(scene.state)
            busy(200)
            checkpointer.save(step, scene.state)
            if step < 2:
                continue
            scene.train()
            restored = checkpointer.restore(scene.state)
            assert restored is not None
            assert restored.step == 2
    assert live(scene.state) == expected


def test_from_the_cpu_and_back(tmp_path: Path) -> None:
    """A checkpoint does not say on what device a tensor was."""
    scene = Scene()
    scene.train()
    write(tmp_path / "run", scene.state)
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    blocking.restore(tmp_path / "run", {"model": model, "optimizer": optimizer})
    assert live({"model": model, "optimizer": optimizer}) == live(scene.state)
    assert all(not tensor.is_cuda for state in optimizer.state.values() for tensor in state.values())
    write(tmp_path / "back", {"model": model, "optimizer": optimizer})
    other = Scene()
    blocking.restore(tmp_path / "back", other.state)
    assert live(other.state) == live(scene.state)
    other.train()


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("already", [0, 2])
def test_training_resumes_bit_for_bit_on_the_device(options: dict[str, bool], already: int, tmp_path: Path) -> None:
    """State that does not exist yet is made beside its parameter; step where the group wants it."""

    def make(seed: int) -> tuple[nn.Module, optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 1)).to(DEVICE)
        return model, optim.AdamW(model.parameters(), lr=0.01, **options)  # type: ignore[arg-type]

    def train(model: nn.Module, optimizer: optim.Optimizer, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = model(torch.randn(4, 8, device=DEVICE)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model, optimizer = make(0)
    train(model, optimizer, 3)
    write(tmp_path / "run", {"m": model, "o": optimizer, "rng": aiockpt.RNG()})
    expected = train(model, optimizer, 3)
    other, resumed = make(1)
    train(other, resumed, already)
    blocking.restore(tmp_path / "run", {"m": other, "o": resumed, "rng": aiockpt.RNG()})
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        for key, value in optimizer.state[theirs].items():
            assert resumed.state[mine][key].device == value.device
    assert train(other, resumed, 3) == expected
