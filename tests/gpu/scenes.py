"""A model in training on the device, and ways to keep the device busy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tests.staging import rig as rigs

DEVICE = "cuda"
MIB = 1 << 20
_CYCLES_PER_MS = 1_500_000
"""A spin of so many takes 0.75 to 1.5 ms at the clocks of today's devices."""


def busy(milliseconds: float = 100) -> torch.cuda.Event:
    """Keep the current stream busy: what is enqueued behind this has not run when its call returns.

    Returns:
        The event behind it; ``query()`` says whether it is over.
    """
    torch.cuda._sleep(int(milliseconds * _CYCLES_PER_MS))
    over = torch.cuda.Event()
    over.record()
    return over


def live(state: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the bytes of all tensors, by dotted name, once the device has done all that was enqueued."""
    torch.cuda.synchronize()
    return rigs.live(state)


class Scene:
    """Eight layers with an AdamW; on each step every tensor changes."""

    def __init__(self, *, width: int = 512, **options: Any) -> None:
        torch.manual_seed(0)
        self.width = width
        self.model = nn.Sequential(*[nn.Linear(width, width) for _ in range(8)]).to(DEVICE)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, **options)
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}

    def loss(self) -> torch.Tensor:
        """Return a loss of a forward pass."""
        result: torch.Tensor = self.model(torch.ones(4, self.width, device=DEVICE)).square().mean()
        return result

    def backward(self) -> None:
        """Make gradients."""
        self.optimizer.zero_grad()
        self.loss().backward()

    def train(self) -> None:
        """Enqueue a step."""
        self.backward()
        self.optimizer.step()


def guarded(scene: Scene, rig: rigs.Rig) -> None:
    """Save twice, and step: from the second save on the guard has what the optimizer owns."""
    scene.train()
    rig.save(scene.state)
    scene.train()
    assert rig.save(scene.state).lazy_nbytes > 0
    scene.train()
