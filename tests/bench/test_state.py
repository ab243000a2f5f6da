"""The states that benchmarks save."""

from __future__ import annotations

import pytest
import torch

from bench.state import flat_tensors, make_state


@pytest.mark.parametrize("nbytes", [1 << 20, 16 << 20, 48 << 20])
def test_a_gpt_state_has_the_asked_size(nbytes: int) -> None:
    """Within three per cent, parameters and both moments counted."""
    state = make_state("gpt", nbytes)
    assert state.nbytes == pytest.approx(nbytes, rel=0.03)
    assert {"model.tokens.weight", "optimizer.0.exp_avg", "optimizer.0.step"} <= set(flat_tensors(state))


def test_many_small_tensors() -> None:
    """4 KiB each, and nothing in the optimizer."""
    state = make_state("many", 40 << 10)
    assert [tensor.nbytes for tensor in flat_tensors(state).values()] == [4096] * 10


def test_a_training_step_changes_every_tensor() -> None:
    """What a save finds differs from what the last one wrote."""
    state = make_state("gpt", 1 << 20)
    before = {name: tensor.clone() for name, tensor in flat_tensors(state).items()}
    state.train_step()
    assert [name for name, tensor in flat_tensors(state).items() if torch.equal(tensor, before[name])] == []
