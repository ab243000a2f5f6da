"""What calls of a Checkpointer return: frozen records."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["Restored", "Saved", "Statistics"]


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that is durable."""

    step: int
    path: str
    """Absolute path of its directory."""
    nbytes: int
    """Bytes of its files."""
    timings: dict[str, float]
    """Seconds since the call of ``save()`` (``blocked``, ``staged``, ``durable``), seconds that the worker spent in a
    phase (``write``, ``sync``, ``commit``), seconds of slow ``state_dict()`` calls by key (``state_dict:KEY``)."""


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """What a restore did."""

    step: int
    path: str
    ordinal: int
    metadata: Any
    """As given to ``save(metadata=…)``."""
    missing: tuple[str, ...]
    """Live names that the checkpoint lacks; only with ``strict=False``."""
    unexpected: tuple[str, ...]
    """Names of the checkpoint that the live state lacks; only with ``strict=False``."""
    skipped: dict[int, str]
    """Newer steps that were passed over, with the reason."""


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counters since ``open()``."""

    committed: int
    failed: int
    cancelled: int
    skipped: int
    committed_nbytes: int
    arena_nbytes: int
    """Shared memory held now."""
    plans: int
    """Plans made; a loop over one state makes one."""
    worker_pid: int | None
    worker_restarts: int
    dropped_answers: int
    """Answers of the worker for a save that was not open."""
