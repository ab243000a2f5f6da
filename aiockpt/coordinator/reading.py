"""Reading a run without a writer: no worker, no lock, beside a running job."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist

from aiockpt.coordinator.results import Restored
from aiockpt.restoring.load import load_checkpoint
from aiockpt.restoring.run import RestoreOutcome, apply_outcome, restore_run
from aiockpt.restoring.targets import Targets, read_targets
from aiockpt.storage.run_directory import scan

__all__ = ["begin", "finish", "load", "read", "steps"]

Globs = str | Iterable[str] | None


def begin(state: Mapping[str, Any], *, include: Globs, exclude: Globs) -> Targets:
    """Look at the live state; in the thread that owns it."""
    return read_targets(state, include, exclude)


def read(path: str | os.PathLike[str], targets: Targets, *, step: int | None, strict: bool) -> RestoreOutcome | None:
    """Choose a checkpoint, read it into the live tensors; in any thread.

    No other rank is asked: each reads for itself, and where one is bad, one rank may take an older step than another.
    """
    return restore_run(path, targets, step=step, strict=strict, rank=_default_rank())


def _default_rank() -> int:
    """Return whose ``PerRank`` values are taken: our rank in torch's default group, 0 where there is none."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def finish(outcome: RestoreOutcome | None) -> Restored | None:
    """Give objects and containers their values; in the thread that owns the state."""
    if outcome is None:
        return None
    apply_outcome(outcome)
    return Restored(
        step=outcome.step,
        path=outcome.path,
        ordinal=outcome.ordinal,
        metadata=outcome.metadata,
        missing=outcome.missing,
        unexpected=outcome.unexpected,
        skipped=outcome.skipped,
    )


def load(path: str | os.PathLike[str], *, step: int | None, include: Globs, mmap: bool) -> dict[str, Any]:
    """Return a checkpoint as a fresh nested dict."""
    return load_checkpoint(path, step=step, include=include, mmap=mmap)


def steps(run: str | os.PathLike[str]) -> list[int]:
    """Return the committed steps, ascending."""
    return sorted(known.step for known in scan(os.fspath(run)).checkpoints)
