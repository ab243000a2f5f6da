"""What scripts of jobs begin with, and how what their ranks told is read."""

from __future__ import annotations

from typing import Any

__all__ = ["SMALL", "errors"]

SMALL = """
    from tests.ranks.at_rank import *
    state = {"own": own(rank), "same": torch.arange(100.0), "progress": {"epoch": 3}}
"""
"""A state of which every rank has something to write."""


def errors(told: list[Any]) -> list[Any]:
    """Return what each rank got, errors by their names."""
    return [one["error"] if isinstance(one, dict) else one for one in told]
