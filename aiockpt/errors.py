"""The errors of aiockpt: one tree, named for what the caller can do about them.

Every message has up to three parts, what happened, why, and what to do next; the same facts stand in fields for
programs. All of them pickle and copy, notes included.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import Any, ClassVar, Self

__all__ = [
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


class CheckpointError(Exception):
    """Root of all errors that aiockpt raises.

    Args:
        what: One sentence without a full stop: what did not happen.
        why: The cause, where it is known.
        next: What the reader can do now.
        **fields: Values for the names in ``FIELDS`` of the class; those not given are ``None``.
    """

    FIELDS: ClassVar[tuple[str, ...]] = ()

    what: str
    why: str
    next: str

    def __init__(self, what: str, *, why: str = "", next: str = "", **fields: Any) -> None:
        super().__init__(what)
        self.what, self.why, self.next = what, why, next
        unknown = fields.keys() - set(type(self).FIELDS)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no field {sorted(unknown)}")
        for name in type(self).FIELDS:
            setattr(self, name, fields.get(name))

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"why: {self.why}")
        if self.next:
            lines.append(f"next: {self.next}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {name: getattr(self, name) for name in type(self).FIELDS}
        return _rebuild, (type(self), self.what, self.why, self.next, fields, getattr(self, "__notes__", []))

    def copy(self) -> Self:
        """Return an equal error without traceback and context, for raising the same failure in another place."""
        rebuild, args = self.__reduce__()
        return rebuild(*args)  # type: ignore[no-any-return]  # the function that __reduce__ names returns our type


def _rebuild(
    cls: type[CheckpointError], what: str, why: str, next: str, fields: dict[str, Any], notes: list[str]
) -> Any:
    error = cls(what, why=why, next=next, **fields)
    for note in notes:
        error.add_note(note)
    return error


class ConfigError(CheckpointError, ValueError):
    """An argument, or the run directory it names, cannot be used."""

    FIELDS = ("argument", "path")
    argument: str | None
    path: str | None


class UsageError(CheckpointError, RuntimeError):
    """A call at the wrong time or place: after close, from a forked child, from two threads at once."""


class UnsupportedValueError(CheckpointError, TypeError):
    """The state holds something that a checkpoint cannot; nothing was copied."""

    FIELDS = ("key", "type_name", "other_key")
    key: str | None
    type_name: str | None
    other_key: str | None


class StateMismatchError(CheckpointError):
    """The live state and the checkpoint do not fit; nothing live was changed."""

    FIELDS = ("step", "missing", "unexpected", "mismatched")
    step: int | None
    missing: tuple[str, ...] | None
    unexpected: tuple[str, ...] | None
    mismatched: tuple[str, ...] | None


class TornSnapshotError(CheckpointError):
    """Tensors were written to while they were being copied; the save was not committed."""

    FIELDS = ("step", "keys")
    step: int | None
    keys: tuple[str, ...] | None


class SaveError(CheckpointError):
    """A save did not end in a committed checkpoint."""


class SaveBusyError(SaveError):
    """``when_busy="raise"`` and no slot was free; the save was not begun."""

    FIELDS = ("step", "busy_step")
    step: int | None
    busy_step: int | None


class SaveCancelledError(SaveError):
    """The save was cancelled, or abandoned at close, before its point of no return."""

    FIELDS = ("step",)
    step: int | None


class SaveTimeoutError(SaveError, TimeoutError):
    """The save did not reach its point of no return within its time."""

    FIELDS = ("step", "timeout", "phase")
    step: int | None
    timeout: float | None
    phase: str | None


class StepExistsError(SaveError, FileExistsError):
    """The run has a checkpoint of this step already."""

    FIELDS = ("step", "path")
    step: int | None
    path: str | None

    def __init__(self, what: str, *, why: str = "", next: str = "", **fields: Any) -> None:
        super().__init__(what, why=why, next=next, **fields)
        # For code that knows it as a FileExistsError only.
        self.errno, self.strerror, self.filename = _errno.EEXIST, os.strerror(_errno.EEXIST), self.path


class StorageError(SaveError, OSError):
    """The operating system refused something; ``errno`` says what."""

    FIELDS = ("errno", "path", "step")
    errno: int | None
    path: str | None
    step: int | None

    def __init__(self, what: str, *, why: str = "", next: str = "", **fields: Any) -> None:
        super().__init__(what, why=why, next=next, **fields)
        # For code that knows it as an OSError only.
        self.strerror = None if self.errno is None else os.strerror(self.errno)
        self.filename = self.path


class PlanMismatchError(SaveError):
    """The ranks do not agree on what is saved; the message names keys and ranks, and what to do."""

    FIELDS = ("step", "keys", "ranks")
    step: int | None
    keys: tuple[str, ...] | None
    ranks: tuple[int, ...] | None


class PeerFailedError(SaveError):
    """A save or restore failed on another rank, and so on all; what that met is the ``__cause__`` where it is known."""

    FIELDS = ("step", "rank", "phase")
    step: int | None
    rank: int | None
    phase: str | None


class CommitUnknownError(SaveError):
    """The point of no return was passed and nobody can say whether the checkpoint is there; look with ``steps()``."""

    FIELDS = ("step", "path")
    step: int | None
    path: str | None


class WorkerError(CheckpointError):
    """The checkpoint worker failed."""


class WorkerStartError(WorkerError):
    """The worker did not come up."""

    FIELDS = ("exit_status", "stderr")
    exit_status: int | None
    stderr: str | None


class WorkerExitedError(WorkerError):
    """The worker died; ``exit_status`` is negative for a signal, None where the kernel gave none."""

    FIELDS = ("exit_status", "stderr", "step")
    exit_status: int | None
    stderr: str | None
    step: int | None


class RestartLimitError(WorkerError):
    """The worker died more often than the restart policy allows; training is unharmed, saving is over."""

    FIELDS = ("restarts", "window")
    restarts: int | None
    window: float | None


class ProtocolError(CheckpointError):
    """Bytes on the wire that are no message of this protocol."""


class RestoreError(CheckpointError):
    """A checkpoint was not restored."""


class StepNotFoundError(RestoreError, LookupError):
    """The run has no checkpoint of this step."""

    FIELDS = ("step", "path")
    step: int | None
    path: str | None


class CheckpointCorruptError(RestoreError):
    """Bytes on disk are not those that were written."""

    FIELDS = ("step", "file", "offset", "expected", "found")
    step: int | None
    file: str | None
    offset: int | None
    expected: str | None
    found: str | None


class NoUsableCheckpointError(RestoreError):
    """Checkpoints exist and none of them is good; starting at step 0 would hide that."""

    FIELDS = ("path", "skipped")
    path: str | None
    skipped: dict[int, str] | None
