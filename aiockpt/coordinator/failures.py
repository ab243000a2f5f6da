"""Errors as data, made exceptions again."""

from __future__ import annotations

import errno
import logging
import os

from aiockpt.coordinator.save_record import SaveRecord
from aiockpt.errors import (
    CommitUnknownError,
    ConfigError,
    PeerFailedError,
    PlanMismatchError,
    SaveCancelledError,
    SaveError,
    SaveTimeoutError,
    StepExistsError,
    StorageError,
    UsageError,
)
from aiockpt.protocol.messages import WireError

__all__ = [
    "abandoned",
    "arena_too_large",
    "as_exception",
    "cancelled",
    "closed",
    "forked",
    "left",
    "not_open",
    "timed_out",
    "unknown",
]

_log = logging.getLogger("aiockpt.save")


def as_exception(error: WireError, save: SaveRecord) -> BaseException:
    """Return the exception of a save that the worker reports as failed."""
    what = f"step {save.step} was not saved: {error.what}"
    match error.kind:
        case "storage" | "memory":
            return StorageError(
                what, why=error.why, next=error.next, errno=error.errno, path=error.path, step=save.step
            )
        case "exists":
            return StepExistsError(what, why=error.why, next=error.next, step=save.step, path=error.path)
        case "cancelled":
            return save.cancelling or cancelled(save)
        case "unknown_commit":
            return CommitUnknownError(what, why=error.why, next=error.next, step=save.step, path=error.path)
        case "config":
            return ConfigError(what, why=error.why, next=error.next, argument="run", path=error.path)
        case "fenced":
            return SaveError(what, why=error.why, next=error.next)
        case "timeout":
            return SaveTimeoutError(what, why=error.why, next=error.next, step=save.step, phase=error.phase)
        case "mismatch":
            return PlanMismatchError(
                what,
                why=error.why,
                next=error.next,
                step=save.step,
                keys=tuple(error.keys),
                ranks=tuple(error.ranks),
            )
        case "peer":
            return PeerFailedError(
                what, why=error.why, next=error.next, step=save.step, rank=error.rank, phase=error.phase
            )
        case "internal":
            _log.error("the worker failed on step %d\n%s", save.step, error.traceback)
            return SaveError(what, why=error.why, next=error.next or "report this with the traceback in the log")


def cancelled(save: SaveRecord) -> SaveCancelledError:
    """The outcome of ``Save.cancel()``."""
    return SaveCancelledError(
        f"the save of step {save.step} was cancelled",
        why="cancel() was called before it was committed",
        next="the checkpoint before it stands; save again where this one is needed",
        step=save.step,
    )


def abandoned(save: SaveRecord, why: str) -> SaveCancelledError:
    """The outcome of a save that closing did not wait for."""
    return SaveCancelledError(
        f"the save of step {save.step} was abandoned",
        why=why,
        next="the checkpoint before it stands; close with drain=True, or give it a longer close_timeout",
        step=save.step,
    )


def left(save: SaveRecord) -> CommitUnknownError:
    """The outcome of a save that an interrupted ``close()`` left to the worker."""
    return CommitUnknownError(
        f"the save of step {save.step} was left to the worker",
        why="close() was interrupted",
        next="what was staged is being finished; look with steps() after a while",
        step=save.step,
    )


def unknown(save: SaveRecord, why: str) -> CommitUnknownError:
    """The outcome of a save of which nobody can say whether it was published."""
    return CommitUnknownError(
        f"nobody can say whether step {save.step} was saved",
        why=why,
        next="look with steps() once the run directory answers again",
        step=save.step,
    )


def timed_out(save: SaveRecord) -> SaveTimeoutError:
    """The outcome of ``save(timeout=…)``."""
    return SaveTimeoutError(
        f"step {save.step} was not saved within {save.timeout:g} s",
        why=f"it was {save.state.value} when the time was up",
        next="give it a longer timeout, or look at the disk",
        step=save.step,
        timeout=save.timeout,
        phase=save.state.value,
    )


def arena_too_large(nbytes: int, why: str) -> StorageError:
    """The outcome of a save whose arena the machine does not carry."""
    return StorageError(
        f"no shared memory for {nbytes} bytes of state",
        why=why,
        next="free memory, raise the memory limit of the job, or save less",
        errno=errno.ENOMEM,
    )


def closed() -> UsageError:
    """What every call gets after ``close()``."""
    return UsageError(
        "the checkpointer is closed", why="close() was called", next="open a new Checkpointer for this run"
    )


def not_open() -> UsageError:
    """What every call gets before ``open()``."""
    return UsageError(
        "the checkpointer is not open",
        why="nothing was done yet to open it",
        next="use it in a with block, or call open() first",
    )


def forked(owner: int) -> UsageError:
    """What every call gets in a forked child of the process ``owner``."""
    return UsageError(
        "this Checkpointer belongs to another process",
        why=f"it was made in process {owner}, this is a forked child, {os.getpid()}",
        next="make a Checkpointer in this process, with a run directory of its own",
    )
