"""What calls of a Checkpointer return: frozen records."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["Restored", "Saved"]


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that is durable."""

    step: int
    path: str
    """Absolute path of its directory."""
    nbytes: int
    """Bytes of its files."""
    timings: dict[str, float]
    """Seconds since the call of ``save()`` (``blocked``, ``staged``, ``durable``); seconds that a part of it took
    (``wait`` and ``reserve`` where there was need, ``collect``, ``stage``, by the worker ``write``, ``sync``,
    ``commit``), explained at ``Statistics.phases``; seconds of slow ``state_dict()`` calls by key
    (``state_dict:KEY``). ``buffered`` is 1.0 where direct I/O was refused."""


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
