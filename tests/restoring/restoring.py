"""Both halves of a restore in one call, and what live memory holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aiockpt.restoring.run import RestoreOutcome, apply_outcome, restore_run
from aiockpt.restoring.targets import read_targets
from aiockpt.state.collect import collect
from aiockpt.state.values import encode_values


def restore(
    path: Path, state: Mapping[Any, Any], *, include: Any = None, exclude: Any = None, **options: Any
) -> RestoreOutcome | None:
    """Restore as a Checkpointer does, in this thread."""
    outcome = restore_run(path, read_targets(state, include, exclude), **options)
    return None if outcome is None else apply_outcome(outcome)


def fingerprint(state: Mapping[Any, Any]) -> tuple[Any, ...]:
    """Return every byte of a state, to tell whether something changed."""
    collected = collect(state)
    tensors = [
        (entry, tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for entry, tensor in zip(collected.entries, collected.tensors, strict=True)
    ]
    return tensors, encode_values(collected.values), repr(collected.tree)
