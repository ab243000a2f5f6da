"""The states that are saved: a GPT-like model with the AdamW that trains it, or many small tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from aiockpt.cli.demo_model import CONTEXT, GPT

__all__ = ["BenchState", "Tensors", "Training", "make_gpt", "make_state"]

_WIDTHS = ((64, 2), (128, 4), (256, 4), (512, 8), (768, 12), (1024, 24), (1600, 48), (2560, 32), (4096, 32))
"""(width, most layers) of GPT-like models, small to large; the vocabulary takes up the rest of the asked size."""
_LARGEST_VOCABULARY = 65_536
_BYTES_PER_PARAMETER = 12  # the parameter and two AdamW moments, float32 each


class BenchState(ABC):
    """What is saved, in the shapes that the systems take it."""

    @property
    @abstractmethod
    def mapping(self) -> dict[str, Any]:
        """The state as aiockpt takes it."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the state as ``torch.save`` and its kin take it."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor of the state under one flat name, as safetensors takes them."""

    @abstractmethod
    def train_step(self) -> None:
        """Change every tensor, as training would."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the state."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


class Training(BenchState):
    """A model and its optimizer, which has stepped once."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        self.train_step()

    @property
    def mapping(self) -> dict[str, Any]:
        """The live objects."""
        return {"model": self.model, "optimizer": self.optimizer}

    def state_dict(self) -> dict[str, Any]:
        """Return the state dicts of both."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the model's tensors and those of the optimizer's state."""
        flat = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            flat |= {f"optimizer.{index}.{key}": value for key, value in values.items() if torch.is_tensor(value)}
        return flat

    def train_step(self) -> None:
        """Step the optimizer with the gradients that are there: all parameters and all their state change."""
        self.optimizer.step()


class Tensors(BenchState):
    """A dict of tensors that no optimizer knows."""

    def __init__(self, count: int, nbytes: int) -> None:
        self._tensors = {f"tensor_{index:06d}": torch.rand(nbytes // 4) for index in range(count)}

    @property
    def mapping(self) -> dict[str, Any]:
        """The dict, under one name."""
        return {"tensors": self._tensors}

    def state_dict(self) -> dict[str, Any]:
        """Return the same."""
        return {"tensors": dict(self._tensors)}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the dict itself."""
        return dict(self._tensors)

    def train_step(self) -> None:
        """Add to each tensor."""
        torch._foreach_add_(list(self._tensors.values()), 1e-3)


class _Parameters(nn.Module):
    """Many small parameters: what costs per tensor instead of per byte."""

    def __init__(self, count: int, nbytes: int) -> None:
        super().__init__()
        self.items = nn.ParameterList(torch.rand(nbytes // 4) for _ in range(count))


def make_state(kind: str, nbytes: int, *, tensor_nbytes: int = 4096, seed: int = 0, device: str = "cpu") -> BenchState:
    """Return a state of this size.

    Args:
        kind: ``gpt``, a GPT with AdamW, within a few per cent of ``nbytes``; ``tensors``, a dict of small tensors;
            ``parameters``, as many in a module with an SGD that keeps nothing.
        nbytes: Of the whole.
        tensor_nbytes: Of each small tensor.
        seed: Of the random values.
        device: Of the parameters of a GPT, and with them of its optimizer's state.
    """
    torch.manual_seed(seed)
    count = max(1, nbytes // tensor_nbytes)
    match kind:
        case "gpt":
            model: nn.Module = make_gpt(nbytes, device)
            return Training(model, torch.optim.AdamW(model.parameters(), lr=1e-6))
        case "tensors":
            return Tensors(count, tensor_nbytes)
        case "parameters":
            model = _Parameters(count, tensor_nbytes)
            return Training(model, torch.optim.SGD(model.parameters(), lr=1e-6))
    raise ValueError(f"there is no state {kind!r}")


def make_gpt(nbytes: int, device: str) -> GPT:
    """Return a GPT that takes ``nbytes`` together with the state of its AdamW."""
    parameters = nbytes // _BYTES_PER_PARAMETER
    width, layers = _WIDTHS[0][0], 1
    for candidate, most in _WIDTHS:
        per_block = _block_parameters(candidate)
        fits = (parameters - candidate * 256) // per_block
        if fits < 1:
            break
        width, layers = candidate, min(most, int(fits))
        if parameters - layers * per_block <= _LARGEST_VOCABULARY * candidate:
            break
    rest = parameters - layers * _block_parameters(width) - (2 + CONTEXT) * width
    with torch.device(device):
        return GPT(width, layers, vocabulary=max(1, rest // width))


def _block_parameters(width: int) -> int:
    return 12 * width**2 + 13 * width
