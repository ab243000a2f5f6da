"""Errors of a restore that other ranks are told: as data, and exceptions of the same class again."""

from __future__ import annotations

from aiockpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    ConfigError,
    PeerFailedError,
    RestoreError,
    StateMismatchError,
    StepNotFoundError,
    StorageError,
)
from aiockpt.protocol.terms import Damage, Kind, WireError

__all__ = ["as_exception", "as_wire_error"]

_MOST_CHARACTERS = 2000
"""Of each part of an error that is told; the rank that met it has all of it."""

_KINDS: tuple[tuple[type[CheckpointError], Kind], ...] = (
    (CheckpointCorruptError, "corrupt"),
    (StepNotFoundError, "missing"),
    (StateMismatchError, "misfit"),
    (StorageError, "storage"),
    (ConfigError, "config"),
    (RestoreError, "cancelled"),  # behind its own subclasses
)


def as_wire_error(exc: BaseException, *, phase: str, step: int | None) -> WireError:
    """Return what the other ranks are told of ``exc``; the hub adds the rank.

    Args:
        exc: What this rank met.
        phase: What it was doing.
        step: Of the checkpoint that it was about, where one was chosen.
    """
    for cls, kind in _KINDS:
        if isinstance(exc, cls):
            return WireError(
                kind=kind,
                what=exc.what[:_MOST_CHARACTERS],
                why=exc.why[:_MOST_CHARACTERS],
                next=exc.next[:_MOST_CHARACTERS],
                errno=getattr(exc, "errno", None),
                path=getattr(exc, "path", None),
                phase=phase,
                damage=_damage(exc, step),
            )
    return WireError(
        kind="internal",
        what="the restore failed",
        why=f"{type(exc).__name__}: {exc}"[:_MOST_CHARACTERS],
        next="look at that rank's log",
        phase=phase,
        damage=_damage(exc, step),
    )


def _damage(exc: BaseException, step: int | None) -> Damage:
    if isinstance(exc, CheckpointCorruptError):
        return Damage(
            step=step if exc.step is None else exc.step,
            file=exc.file,
            offset=exc.offset,
            expected=exc.expected,
            found=exc.found,
        )
    own: int | None = getattr(exc, "step", None)
    return Damage(step=step if own is None else own)


def as_exception(error: WireError) -> CheckpointError:
    """Return the exception that this rank raises for what another rank, or the hub, has met."""
    damage = error.damage or Damage()
    match error.kind:
        case "corrupt":
            return CheckpointCorruptError(
                error.what,
                why=error.why,
                next=error.next,
                step=damage.step,
                file=damage.file,
                offset=damage.offset,
                expected=damage.expected,
                found=damage.found,
            )
        case "missing":
            return StepNotFoundError(error.what, why=error.why, next=error.next, step=damage.step, path=error.path)
        case "misfit":
            return StateMismatchError(error.what, why=error.why, next=error.next, step=damage.step)
        case "storage":
            return StorageError(
                error.what, why=error.why, next=error.next, errno=error.errno, path=error.path, step=damage.step
            )
        case "config":
            return ConfigError(error.what, why=error.why, next=error.next, path=error.path)
        case "mismatch":
            return ConfigError(error.what, why=error.why, next=error.next, argument="step")
        case _:
            return PeerFailedError(
                f"no checkpoint was restored: {error.what}",
                why=error.why,
                next=error.next,
                step=damage.step,
                rank=error.rank,
                phase=error.phase,
            )
