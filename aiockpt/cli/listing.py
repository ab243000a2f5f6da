"""What a run directory holds, as the commands name it."""

from __future__ import annotations

import contextlib
import os

import msgspec

from aiockpt.errors import CheckpointCorruptError, CheckpointError, ConfigError, StepNotFoundError
from aiockpt.format.manifest import HEAD_NBYTES, Head, parse_head
from aiockpt.format.names import MANIFEST_NAME, RUN_RECORD_NAME, parse_bad, parse_step
from aiockpt.storage.failures import storage_errors
from aiockpt.storage.run_directory import Committed, is_step_directory, open_run, scan
from aiockpt.storage.run_record import RunRecord, read_record

__all__ = ["Bad", "Checkpoint", "Damaged", "Listing", "find", "newest", "read_listing", "read_target", "readable"]


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A committed checkpoint."""

    step: int
    nbytes: int
    created: str | None
    """UTC, ISO 8601; None where it was removed meanwhile."""
    term: int
    ordinal: int
    save_id: str
    path: str


class Damaged(msgspec.Struct, frozen=True, kw_only=True):
    """A directory that is named as a checkpoint and is none."""

    step: int
    path: str
    why: str


class Bad(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that a restore found bad and put aside."""

    step: int
    path: str


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """A run directory."""

    run: str
    run_id: str | None
    checkpoints: list[Checkpoint]
    """Newest first: the first is what a restore takes."""
    damaged: list[Damaged]
    bad: list[Bad]


def read_listing(run: str) -> Listing:
    """Read a run directory; writes nothing and takes no lock.

    Raises:
        ConfigError: It is no run directory.
        StorageError: It cannot be read.
    """
    run = os.path.abspath(run)
    record = _record(run)
    found = scan(run)
    bad = _bad(run)
    if record is None and not (found.checkpoints or found.unreadable or bad):
        one = f'it is one checkpoint: look with "aiockpt inspect {run}"' if is_step_directory(run) else ""
        raise ConfigError(
            f"{run} is no run directory",
            why=f"it has neither {RUN_RECORD_NAME} nor a checkpoint",
            next=one or "give the directory that a Checkpointer saves into",
            argument="run",
            path=run,
        )
    checkpoints = [_checkpoint(known, known.path, _created(known.path)) for known in found.checkpoints]
    damaged = [Damaged(step=entry.step, path=entry.path, why=entry.why) for entry in found.unreadable]
    run_id = record.run_id if record is not None else None
    return Listing(run=run, run_id=run_id, checkpoints=checkpoints, damaged=damaged, bad=bad)


def read_target(path: str) -> Listing:
    """Read a run directory, or the directory of one step as a run that has nothing else.

    Raises:
        ConfigError: It is neither.
        StorageError: It cannot be read.
    """
    where = os.path.abspath(path)
    if not is_step_directory(where):
        return read_listing(path)
    os.close(open_run(where))  # says what is wrong where it is no directory
    entry = _one(where)
    return Listing(
        run=where,
        run_id=None,
        checkpoints=[entry] if isinstance(entry, Checkpoint) else [],
        damaged=[entry] if isinstance(entry, Damaged) else [],
        bad=[],
    )


def newest(listing: Listing) -> Checkpoint:
    """Return the checkpoint that a restore takes.

    Raises:
        StepNotFoundError: There is none.
    """
    if listing.checkpoints:
        return listing.checkpoints[0]
    raise StepNotFoundError(
        f"{listing.run} has no checkpoint",
        why="; ".join(f"{os.path.basename(entry.path)} is damaged: {entry.why}" for entry in listing.damaged[:3]),
        next="check the path",
        path=listing.run,
    )


def find(listing: Listing, step: int) -> Checkpoint | Damaged:
    """Return what stands as this step.

    Raises:
        StepNotFoundError: Nothing does.
    """
    standing: list[Checkpoint | Damaged] = [*listing.checkpoints, *listing.damaged]
    for entry in standing:
        if entry.step == step:
            return entry
    steps = sorted(entry.step for entry in listing.checkpoints)
    aside = any(entry.step == step for entry in listing.bad)
    raise StepNotFoundError(
        f"{listing.run} has no step {step}",
        why="a restore found it bad and put it aside" if aside else _which(steps),
        next=f'look with "aiockpt ls {listing.run}"',
        step=step,
        path=listing.run,
    )


def readable(entry: Checkpoint | Damaged) -> Checkpoint:
    """Return a checkpoint that has a manifest.

    Raises:
        CheckpointCorruptError: This one has none.
    """
    if isinstance(entry, Checkpoint):
        return entry
    raise CheckpointCorruptError(
        f"step {entry.step} is damaged", why=entry.why, next="look at another step", step=entry.step, file=entry.path
    )


def _which(steps: list[int]) -> str:
    if not steps:
        return "it has no checkpoint"
    shown = ", ".join(map(str, steps)) if len(steps) <= 5 else f"{steps[0]} to {steps[-1]}, {len(steps)} in all"
    return f"it has {shown}"


def _record(run: str) -> RunRecord | None:
    run_fd = open_run(run)
    try:
        with storage_errors("a run directory was not read", run):
            return read_record(run_fd, run)
    finally:
        os.close(run_fd)


def _checkpoint(known: Committed | Head, path: str, created: str | None) -> Checkpoint:
    return Checkpoint(
        step=known.step,
        nbytes=known.nbytes,
        created=created,
        term=known.term,
        ordinal=known.ordinal,
        save_id=known.save_id,
        path=path,
    )


def _one(path: str) -> Checkpoint | Damaged:
    named = parse_step(os.path.basename(path))
    with storage_errors("a manifest was not read", path):
        try:
            head = _head(path)
        except FileNotFoundError:
            why = f"it has no {MANIFEST_NAME}"
        except CheckpointCorruptError as exc:
            why = exc.why
        else:
            if named in (None, head.step):
                return _checkpoint(head, path, head.created)
            why = f"its manifest is that of step {head.step}"
    return Damaged(step=named or 0, path=path, why=why)


def _created(path: str) -> str | None:
    with contextlib.suppress(OSError, CheckpointError):
        return _head(path).created
    return None


def _head(path: str) -> Head:
    file = f"{path}/{MANIFEST_NAME}"
    with open(os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as manifest:  # a FIFO must not hang us
        return parse_head(manifest.read(HEAD_NBYTES) or b"", file=file)


def _bad(run: str) -> list[Bad]:
    with storage_errors("a run was not listed", run):
        names = sorted(os.listdir(run))
    parsed = [(known.step, name) for name in names if (known := parse_bad(name)) is not None]
    return [Bad(step=step, path=f"{run}/{name}") for step, name in sorted(parsed)]
