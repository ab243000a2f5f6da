"""The function of a module that imports torch, as those of trainers do."""

from __future__ import annotations

import torch

from bench import trainees

__all__ = ["announce"]


def announce(rank: int, door: str, gate: str) -> None:
    """Say that this process is there, torch and all; see ``bench.trainees.announce``."""
    assert torch.__version__
    trainees.announce(rank, door, gate)
