"""Restores into CUDA memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn, optim

from aiockpt.state.rng import RNG
from tests.restoring.restoring import restore
from tests.restoring.writing import write_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def test_tensors_of_every_layout_are_written_on_the_device(tmp_path: Path):
    """Contiguous ones block by block on side streams, others by torch; what was enqueued before reads old values."""
    big = torch.randn(3_000_000)
    saved = {"big": big, "strided": torch.randn(40, 50), "half": torch.randn(7).half(), "scalar": torch.tensor(3)}
    write_step(tmp_path, 1, saved)
    live = {
        "big": torch.zeros(3_000_000, device="cuda"),
        "strided": torch.zeros(50, 40, device="cuda").t(),
        "half": torch.zeros(7, device="cuda").half(),
        "scalar": torch.tensor(0, device="cuda"),
    }
    torch.cuda._sleep(50_000_000)
    before = live["big"] + 1
    addresses = {key: tensor.data_ptr() for key, tensor in live.items()}
    restore(tmp_path, live)
    assert before.eq(1).all()
    for key, tensor in live.items():
        assert torch.equal(tensor.cpu(), saved[key]), key
        assert tensor.data_ptr() == addresses[key]


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("already", [0, 2])
def test_training_resumes_bit_for_bit_on_the_device(options: dict[str, bool], already: int, tmp_path: Path):
    """State that does not exist yet is made beside its parameter; step where the group wants it."""

    def make(seed: int) -> tuple[nn.Module, optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 1)).cuda()
        return model, optim.AdamW(model.parameters(), lr=0.01, **options)  # type: ignore[arg-type]

    def train(model: nn.Module, optimizer: optim.Optimizer, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = model(torch.randn(4, 8, device="cuda")).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model, optimizer = make(0)
    train(model, optimizer, 3)
    write_step(tmp_path, 3, {"m": model, "o": optimizer, "rng": RNG()})
    expected = train(model, optimizer, 3)
    other, resumed = make(1)
    train(other, resumed, already)
    restore(tmp_path, {"m": other, "o": resumed, "rng": RNG()})
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        for key, value in optimizer.state[theirs].items():
            assert resumed.state[mine][key].device == value.device
    assert train(other, resumed, 3) == expected
