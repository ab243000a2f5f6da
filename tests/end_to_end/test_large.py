"""A tensor of more than 4 GiB: offsets beyond 32 bits, everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aiockpt import blocking

pytestmark = [pytest.mark.process, pytest.mark.slow]


@pytest.mark.timeout(900)
def test_one_tensor_over_four_gib(tmp_path: Path) -> None:
    """Saved, verified, and restored bit for bit; so are the tensors behind it."""
    state = {"m": {"big": torch.arange((4 << 27) + 5), "behind": torch.arange(7, dtype=torch.int32)}}
    assert state["m"]["big"].nbytes > 4 << 30
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.save(0, state).result(600)
        state["m"]["big"].zero_()
        state["m"]["behind"].zero_()
        assert ckpt.verify(0) > 4 << 30
        ckpt.restore(state)
    assert state["m"]["behind"].tolist() == list(range(7))
    for start in range(0, len(state["m"]["big"]), 1 << 26):
        part = state["m"]["big"][start : start + (1 << 26)]
        assert torch.equal(part, torch.arange(start, start + len(part)))
