"""The states that benchmarks save."""

from __future__ import annotations

import pytest
import torch

from bench.state import Training, make_state


@pytest.mark.parametrize("nbytes", [1 << 20, 16 << 20, 48 << 20])
def test_a_gpt_state_has_the_asked_size(nbytes: int) -> None:
    """Within three per cent, parameters and both moments counted."""
    state = make_state("gpt", nbytes)
    assert state.nbytes == pytest.approx(nbytes, rel=0.03)
    assert {"model.tokens.weight", "optimizer.0.exp_avg", "optimizer.0.step"} <= set(state.tensors())


def test_a_gpt_can_be_trained() -> None:
    """It computes with all its parameters, and no tensor stands in it twice."""
    state = make_state("gpt", 1 << 20)
    assert isinstance(state, Training)
    state.optimizer.zero_grad()
    state.model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    assert all(parameter.grad is not None for parameter in state.model.parameters())
    assert len({tensor.data_ptr() for tensor in state.tensors().values()}) == len(state.tensors())


@pytest.mark.parametrize("kind", ["tensors", "parameters"])
def test_many_small_tensors(kind: str) -> None:
    """Of the asked size, and nothing else."""
    state = make_state(kind, 40 << 10)
    assert [tensor.nbytes for tensor in state.tensors().values()] == [4096] * 10
    assert make_state(kind, 2 << 10, tensor_nbytes=1 << 10).nbytes == 2 << 10


@pytest.mark.parametrize("kind", ["gpt", "tensors", "parameters"])
def test_a_training_step_changes_every_tensor(kind: str) -> None:
    """What a save finds differs from what the last one wrote."""
    state = make_state(kind, 1 << 20)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    state.train_step()
    assert [name for name, tensor in state.tensors().items() if torch.equal(tensor, before[name])] == []


def test_there_is_no_other_state() -> None:
    """A typing mistake is named."""
    with pytest.raises(ValueError, match="gtp"):
        make_state("gtp", 1 << 20)
