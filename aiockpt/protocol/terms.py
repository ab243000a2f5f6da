"""What both wires are made of: numbers, and errors as data."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

__all__ = ["Count", "Damage", "Kind", "Seconds", "WireError"]

Count = Annotated[int, msgspec.Meta(ge=0)]
"""A number, offset or size; a negative one is refused when it is decoded, before it can index anything."""
Seconds = Annotated[float, msgspec.Meta(ge=0)]


Kind = Literal[
    "storage",
    "memory",
    "fenced",
    "exists",
    "cancelled",
    "config",
    "unknown_commit",
    "internal",
    "peer",
    "mismatch",
    "timeout",
    "corrupt",
    "missing",
    "misfit",
]
"""Of an error. The last three are of a restore: a checkpoint is damaged, is not there, does not fit the live state."""


class Damage(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Where a checkpoint was found corrupt, as ``CheckpointCorruptError`` has it."""

    step: Count | None = None
    file: str | None = None
    offset: Count | None = None
    expected: str | None = None
    found: str | None = None


class WireError(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An error as data; the coordinator makes the exception from ``kind``."""

    kind: Kind
    what: str
    why: str = ""
    next: str = ""
    errno: int | None = None
    path: str | None = None
    traceback: str = ""
    """Of an internal error, for the log."""
    rank: int | None = None
    """On which rank it was met, where there are several; None where no single one is to blame."""
    phase: str = ""
    """What that rank was doing."""
    keys: list[str] = []
    """Of a mismatch: the dotted names that it is about."""
    ranks: list[int] = []
    """Of a mismatch: the ranks that differ."""
    damage: Damage | None = None
    """Of what is corrupt."""
