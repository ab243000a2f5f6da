"""Errors as data, made exceptions again."""

from __future__ import annotations

import errno
import logging
import os

from aiockpt.coordinator.save_record import SaveRecord
from aiockpt.errors import (
    CheckpointError,
    CommitUnknownError,
    ConfigError,
    PeerFailedError,
    PlanMismatchError,
    SaveBusyError,
    SaveCancelledError,
    SaveError,
    SaveTimeoutError,
    StepExistsError,
    StorageError,
    UsageError,
    WorkerExitedError,
)
from aiockpt.protocol.terms import Kind, WireError

__all__ = [
    "abandoned",
    "arena_too_large",
    "as_data",
    "as_exception",
    "busy",
    "cancelled",
    "closed",
    "forked",
    "left",
    "no_rank_0",
    "not_open",
    "peer_failed",
    "timed_out",
    "too_many_deaths",
    "unknown",
]

_log = logging.getLogger("aiockpt.save")


_OF_ALL_RANKS = frozenset({"exists", "unknown_commit", "fenced", "timeout", "mismatch"})
"""Kinds of errors that say the same on every rank; others are those of the rank that met them."""


def as_exception(error: WireError, save: SaveRecord, rank: int = 0) -> BaseException:
    """Return the exception of a save that the worker reports as failed.

    Args:
        error: As it came.
        save: The save.
        rank: Of this process, where there are several.
    """
    if error.rank is not None and error.rank == rank and save.cancelling is not None:
        return save.cancelling
    if error.rank is not None and error.rank != rank and error.kind not in _OF_ALL_RANKS:
        failed = peer_failed(error, f"step {save.step} was not saved", rank=error.rank, step=save.step)
        if error.kind not in ("peer", "internal"):  # those say no more than this does
            failed.__cause__ = _as_met(error, save)
        return failed
    return _as_met(error, save)


def _as_met(error: WireError, save: SaveRecord) -> BaseException:
    """Return the exception as the rank that met the error has it."""
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
        case "corrupt" | "missing" | "misfit":
            return SaveError(what, why=error.why, next=error.next)  # no save meets these; said as it came
        case "internal":
            _log.error("the worker failed on step %d\n%s", save.step, error.traceback)
            return SaveError(what, why=error.why, next=error.next or "report this with the traceback in the log")


def as_data(error: CheckpointError, *, phase: str) -> WireError:
    """Return an error of this trainer as other ranks are told of it."""
    kind: Kind = "peer"
    if isinstance(error, StorageError):
        kind = "storage"
    elif isinstance(error, SaveCancelledError):
        kind = "cancelled"
    return WireError(
        kind=kind,
        what=error.what,
        why=error.why,
        next=error.next,
        errno=getattr(error, "errno", None),
        path=getattr(error, "path", None),
        phase=phase,
    )


def peer_failed(error: WireError, what: str, *, rank: int | None, step: int | None = None) -> PeerFailedError:
    """Return the error of what failed on another rank, with that rank's words."""
    where = "another rank" if rank is None else f"rank {rank}"
    cause = f"{error.what}: {error.why}" if error.why else error.what
    return PeerFailedError(
        f"{what}: {where} failed",
        why=f"{error.phase}: {cause}" if error.phase else cause,
        next=error.next or f"look at the log of {where}",
        step=step,
        rank=rank,
        phase=error.phase or None,
    )


def no_rank_0(why: str, seconds: float | None) -> PeerFailedError:
    """The ranks did not find each other."""
    return PeerFailedError(
        f"this rank was not taken in within {seconds:g} s" if seconds else "this rank was not taken in",
        why=why,
        next="open the Checkpointer of the same run on all ranks, or give it a longer start_timeout; see rank 0's log",
        rank=0,
        phase="open",
    )


def busy(save: SaveRecord) -> SaveBusyError:
    """The outcome of ``when_busy="raise"`` where another rank has no free slot."""
    return SaveBusyError(
        f"step {save.step} was not saved: the slot of a rank is taken",
        why="a rank has not finished the save before",
        next='await ckpt.wait_ready() on all ranks, save less often, or use when_busy="wait"',
        step=save.step,
    )


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


def too_many_deaths(save: SaveRecord, error: CheckpointError) -> WorkerExitedError:
    """The outcome of a save whose retry went as its first try did."""
    return WorkerExitedError(
        f"step {save.step} was not saved: {save.deaths} workers died on it",
        why=error.why,
        next="the checkpoint before it stands; look at the worker's log",
        exit_status=getattr(error, "exit_status", None),
        stderr=getattr(error, "stderr", None),
        step=save.step,
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
