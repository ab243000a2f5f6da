"""The state that is saved: a GPT-like model with the AdamW that trains it, of the asked size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["BenchState", "flat_tensors", "gpt_state", "make_state", "many_state"]

_WIDTHS = ((64, 2), (128, 4), (256, 4), (512, 8), (768, 12), (1024, 24), (1600, 48), (2560, 32), (4096, 32))
"""(width, most layers) of GPT-like models, small to large; the vocabulary takes up the rest of the asked size."""
_LARGEST_VOCABULARY = 65_536
_BYTES_PER_PARAMETER = 12  # the parameter and two AdamW moments, float32 each


@dataclass(frozen=True)
class BenchState:
    """A model, its optimizer, and what a training step changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def mapping(self) -> dict[str, Any]:
        """The state as aiockpt takes it."""
        return {"model": self.model, "optimizer": self.optimizer}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as ``torch.save`` and its kin take it."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def train_step(self) -> None:
        """Step the optimizer with the gradients that are there: all parameters and all their state change."""
        self.optimizer.step()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the state."""
        return sum(tensor.nbytes for tensor in flat_tensors(self).values())


class _Block(nn.Module):
    """The parameters of one GPT block; nothing is ever computed with them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)


class _GPT(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)


class _Many(nn.Module):
    """Many small parameters: the case that costs per tensor instead of per byte."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.items = nn.ParameterList(torch.rand(1024) for _ in range(count))


def gpt_state(nbytes: int) -> BenchState:
    """Return a GPT-like model with AdamW state, within a few per cent of ``nbytes``."""
    parameters = nbytes // _BYTES_PER_PARAMETER
    width, layers = _WIDTHS[0][0], 1
    for candidate, most in _WIDTHS:
        per_block = 12 * candidate**2 + 13 * candidate
        fits = (parameters - candidate * 256) // per_block
        if fits < 1:
            break
        width, layers = candidate, min(most, int(fits))
        if parameters - layers * per_block <= _LARGEST_VOCABULARY * candidate:
            break
    rest = parameters - layers * (12 * width**2 + 13 * width) - 2 * width
    return _with_adamw(_GPT(max(1, rest // width), width, layers))


def many_state(nbytes: int) -> BenchState:
    """Return a model of ``nbytes / 4 KiB`` tensors of 4 KiB with an SGD that keeps nothing."""
    model = _Many(max(1, nbytes // 4096))
    return _with_gradients(model, torch.optim.SGD(model.parameters(), lr=1e-6))


def make_state(kind: str, nbytes: int, *, seed: int = 0) -> BenchState:
    """Return the state of this kind, ``gpt`` or ``many``, with its optimizer stepped once."""
    torch.manual_seed(seed)
    return {"gpt": gpt_state, "many": many_state}[kind](nbytes)


def _with_adamw(model: nn.Module) -> BenchState:
    return _with_gradients(model, torch.optim.AdamW(model.parameters(), lr=1e-6))


def _with_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> BenchState:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    state = BenchState(model, optimizer)
    state.train_step()
    return state


def flat_tensors(state: BenchState) -> dict[str, torch.Tensor]:
    """Return every tensor of the state under one flat name, as safetensors takes them."""
    flat = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        flat |= {f"optimizer.{index}.{key}": value for key, value in values.items() if torch.is_tensor(value)}
    return flat
