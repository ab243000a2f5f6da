"""Asyncio-native checkpoints for PyTorch.

Importing this package imports neither torch nor anyio: names are loaded when they are first used (PEP 562), so that
the checkpoint worker and the command line stay small.
"""

from __future__ import annotations

import importlib

from aiockpt._version import __version__

TYPE_CHECKING = False  # that of typing, whose import the guardian of ``aiockpt.elastic`` does not wait for
if TYPE_CHECKING:
    from typing import Any

    from aiockpt import blocking
    from aiockpt.checkpointer import Checkpointer, Save, load, restore, steps
    from aiockpt.config import Every, Latest, RestartPolicy
    from aiockpt.coordinator.results import Restored, Saved
    from aiockpt.coordinator.statistics import Statistics
    from aiockpt.errors import (
        CheckpointCorruptError,
        CheckpointError,
        CommitUnknownError,
        ConfigError,
        NoUsableCheckpointError,
        PeerFailedError,
        PlanMismatchError,
        ProtocolError,
        RestartLimitError,
        RestoreError,
        SaveBusyError,
        SaveCancelledError,
        SaveError,
        SaveTimeoutError,
        StateMismatchError,
        StepExistsError,
        StepNotFoundError,
        StorageError,
        TornSnapshotError,
        UnsupportedValueError,
        UsageError,
        WorkerError,
        WorkerExitedError,
        WorkerStartError,
    )
    from aiockpt.observing import Observer, Span
    from aiockpt.state.per_rank import PerRank
    from aiockpt.state.rng import RNG

__all__ = [
    "RNG",
    "Checkpointer",
    "Every",
    "Latest",
    "Observer",
    "PerRank",
    "RestartPolicy",
    "Restored",
    "Save",
    "Saved",
    "Span",
    "Statistics",
    "__version__",
    "blocking",
    "load",
    "restore",
    "steps",
    "CheckpointError",
    "ConfigError",
    "UsageError",
    "UnsupportedValueError",
    "StateMismatchError",
    "TornSnapshotError",
    "SaveError",
    "SaveBusyError",
    "SaveCancelledError",
    "SaveTimeoutError",
    "StepExistsError",
    "StorageError",
    "CommitUnknownError",
    "PeerFailedError",
    "PlanMismatchError",
    "WorkerError",
    "WorkerStartError",
    "WorkerExitedError",
    "RestartLimitError",
    "ProtocolError",
    "RestoreError",
    "StepNotFoundError",
    "CheckpointCorruptError",
    "NoUsableCheckpointError",
]

_HOMES = {
    "aiockpt.checkpointer": ("Checkpointer", "Save", "load", "restore", "steps"),
    "aiockpt.config": ("Every", "Latest", "RestartPolicy"),
    "aiockpt.coordinator.results": ("Restored", "Saved"),
    "aiockpt.coordinator.statistics": ("Statistics",),
    "aiockpt.observing": ("Observer", "Span"),
    "aiockpt.state.per_rank": ("PerRank",),
    "aiockpt.state.rng": ("RNG",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
"""Where each name is defined; the errors' home goes without saying."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'aiockpt' has no attribute {name!r}")
    if name == "blocking":
        return importlib.import_module("aiockpt.blocking")
    value = getattr(importlib.import_module(_HOME_OF.get(name, "aiockpt.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
