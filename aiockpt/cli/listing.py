"""What a run directory holds, as the commands name it."""

from __future__ import annotations

import contextlib
import os

import msgspec

from aiockpt.errors import CheckpointError, ConfigError, StepNotFoundError
from aiockpt.format.manifest import HEAD_NBYTES, parse_head
from aiockpt.format.names import MANIFEST_NAME, RUN_RECORD_NAME, parse_bad
from aiockpt.storage.failures import storage_errors
from aiockpt.storage.run_directory import open_run, scan
from aiockpt.storage.run_record import RunRecord, read_record

__all__ = ["Bad", "Checkpoint", "Damaged", "Listing", "find", "read_listing"]


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
        raise ConfigError(
            f"{run} is no run directory",
            why=f"it has neither {RUN_RECORD_NAME} nor a checkpoint",
            next="give the directory that a Checkpointer saves into",
            argument="run",
            path=run,
        )
    checkpoints = [
        Checkpoint(
            step=known.step,
            nbytes=known.nbytes,
            created=_created(known.path),
            term=known.term,
            ordinal=known.ordinal,
            save_id=known.save_id,
            path=known.path,
        )
        for known in found.checkpoints
    ]
    damaged = [Damaged(step=entry.step, path=entry.path, why=entry.why) for entry in found.unreadable]
    run_id = record.run_id if record is not None else None
    return Listing(run=run, run_id=run_id, checkpoints=checkpoints, damaged=damaged, bad=bad)


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


def _created(path: str) -> str | None:
    file = f"{path}/{MANIFEST_NAME}"
    with contextlib.suppress(OSError, CheckpointError), open(file, "rb") as manifest:
        return parse_head(manifest.read(HEAD_NBYTES), file=file).created
    return None


def _bad(run: str) -> list[Bad]:
    with storage_errors("a run was not listed", run):
        names = sorted(os.listdir(run))
    parsed = [(known.step, name) for name in names if (known := parse_bad(name)) is not None]
    return [Bad(step=step, path=f"{run}/{name}") for step, name in sorted(parsed)]
