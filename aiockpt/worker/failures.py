"""Errors of the worker as data for the wire."""

from __future__ import annotations

import os
import traceback

from aiockpt.errors import (
    CheckpointError,
    CommitUnknownError,
    ConfigError,
    PlanMismatchError,
    ProtocolError,
    SaveCancelledError,
    StepExistsError,
    StorageError,
)
from aiockpt.protocol.terms import Kind, WireError
from aiockpt.storage.failures import FencedError, storage_error

__all__ = ["as_wire_error", "protocol_error_in"]

_KINDS: tuple[tuple[type[CheckpointError], Kind], ...] = (
    (CommitUnknownError, "unknown_commit"),
    (FencedError, "fenced"),  # before its base class
    (StepExistsError, "exists"),
    (SaveCancelledError, "cancelled"),
    (PlanMismatchError, "mismatch"),
    (StorageError, "storage"),
    (ConfigError, "config"),
)


def as_wire_error(exc: BaseException) -> WireError:
    """Return what the trainer is told of ``exc``; its traceback too where it is a bug."""
    if isinstance(exc, BaseExceptionGroup):
        return as_wire_error(exc.exceptions[0])
    if isinstance(exc, OSError) and not isinstance(exc, CheckpointError):
        path = os.fsdecode(exc.filename) if isinstance(exc.filename, (str, bytes)) else "the run directory"
        exc = storage_error("a file operation failed", exc, path=path)
    for cls, kind in _KINDS:
        if isinstance(exc, cls):
            return WireError(
                kind=kind,
                what=exc.what,
                why=exc.why,
                next=exc.next,
                errno=getattr(exc, "errno", None),
                path=getattr(exc, "path", None),
                keys=list(getattr(exc, "keys", None) or ()),
                ranks=list(getattr(exc, "ranks", None) or ()),
            )
    return WireError(
        kind="internal",
        what="the worker met an error that it does not know",
        why=f"{type(exc).__name__}: {exc}",
        next="report this with the traceback in the log",
        traceback="".join(traceback.format_exception(exc)),
    )


def protocol_error_in(exc: BaseException) -> ProtocolError | None:
    """Return the protocol error in ``exc``, which may be a group."""
    if isinstance(exc, BaseExceptionGroup):
        return next(filter(None, map(protocol_error_in, exc.exceptions)), None)
    return exc if isinstance(exc, ProtocolError) else None
