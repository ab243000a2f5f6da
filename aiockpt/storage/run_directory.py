"""Which checkpoints and terms stand in a run directory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

from aiockpt.errors import CheckpointCorruptError
from aiockpt.format.manifest import HEAD_NBYTES, parse_head
from aiockpt.format.names import MANIFEST_NAME, RUN_RECORD_NAME, parse_step, parse_term, step_name
from aiockpt.storage.failures import refused, storage_error, storage_errors

__all__ = ["Committed", "Scan", "Unreadable", "find_committed", "highest_term", "is_step_directory", "open_run", "scan"]

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OPEN_HEAD = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO of that name must not hang the scan


@dataclass(frozen=True, slots=True)
class Committed:
    """A checkpoint that can be seen."""

    step: int
    term: int
    ordinal: int
    save_id: str
    nbytes: int
    path: str
    """Absolute."""


class Unreadable(NamedTuple):
    """A directory that is named as a checkpoint and has no usable head: proven damage, not a failed read."""

    step: int
    path: str
    why: str


class Scan(NamedTuple):
    """The checkpoints of a run."""

    checkpoints: list[Committed]
    """Newest first, by (term, ordinal)."""
    unreadable: list[Unreadable]
    """By step, highest first."""


def open_run(run: str) -> int:
    """Open the directory of a run that exists; the caller closes the descriptor.

    Raises:
        ConfigError: It is not there, or is no directory.
        StorageError: It cannot be opened.
    """
    try:
        return os.open(run, _OPEN_DIRECTORY)
    except FileNotFoundError as exc:
        raise refused(run, "it does not exist", "check the path") from exc
    except NotADirectoryError as exc:
        raise refused(run, "it is a file, or a part of its path is one", "give the path of a directory") from exc
    except OSError as exc:
        raise storage_error("a run directory was not opened", exc, path=run) from exc


def is_step_directory(path: str) -> bool:
    """Tell whether a path is that of one checkpoint, damaged or not, and not of a run."""
    if os.path.lexists(f"{path}/{MANIFEST_NAME}"):
        return True
    return parse_step(os.path.basename(path)) is not None and not os.path.lexists(f"{path}/{RUN_RECORD_NAME}")


def scan(run: str) -> Scan:
    """List the checkpoints of a run directory by the first bytes of their manifests.

    Raises:
        StorageError: The directory, or a manifest in it, cannot be read; that is no proof of corruption.
        ConfigError: The run is not there, or a checkpoint is of a newer format.
    """
    run = os.path.abspath(run)
    run_fd = open_run(run)
    try:
        with storage_errors("a run was not listed", run):
            return _scan(run_fd, run)
    finally:
        os.close(run_fd)


def _scan(run_fd: int, run: str) -> Scan:
    checkpoints: list[Committed] = []
    unreadable: list[Unreadable] = []
    with os.scandir(run_fd) as entries:
        found = [(step, entry.name) for entry in entries if (step := parse_step(entry.name)) is not None]
    for step, name in found:
        path = f"{run}/{name}"
        try:
            committed = _read_head(run_fd, name, step, path)
        except CheckpointCorruptError as exc:
            unreadable.append(Unreadable(step, path, exc.why))
            continue
        if committed is not None:
            checkpoints.append(committed)
    checkpoints.sort(key=lambda known: (known.term, known.ordinal), reverse=True)
    unreadable.sort(reverse=True)
    return Scan(checkpoints, unreadable)


def _read_head(run_fd: int, name: str, step: int, path: str) -> Committed | None:
    """Return what a step's manifest begins with, None where the directory went away meanwhile."""
    file = f"{path}/{MANIFEST_NAME}"
    try:
        fd = os.open(f"{name}/{MANIFEST_NAME}", _OPEN_HEAD, dir_fd=run_fd)
        try:
            data = os.read(fd, HEAD_NBYTES)
        finally:
            os.close(fd)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as exc:
        try:
            os.stat(name, dir_fd=run_fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        why = f"it has no {MANIFEST_NAME}" if isinstance(exc, FileNotFoundError) else "it is no directory of ours"
        raise _damaged(path, step, why) from exc
    except OSError as exc:
        raise storage_error("a manifest was not read", exc, path=file) from exc
    head = parse_head(data, file=file)
    if head.step != step:
        raise _damaged(path, step, f"its manifest is that of step {head.step}")
    return Committed(step, head.term, head.ordinal, head.save_id, head.nbytes, path)


def _damaged(path: str, step: int, why: str) -> CheckpointCorruptError:
    return CheckpointCorruptError(
        f"{path} is no checkpoint", why=why, next="restore another step", step=step, file=f"{path}/{MANIFEST_NAME}"
    )


def find_committed(run_fd: int, run: str, step: int, *, name: str = "") -> Committed | None:
    """Return the checkpoint that stands as ``step-N``, None where none does or it has no usable head.

    Args:
        run_fd: The run directory.
        run: Its absolute path, for the result.
        step: Training step.
        name: Of the directory, where it is another one.

    Raises:
        StorageError: It cannot be read.
        ConfigError: It is of a newer format.
    """
    name = name or step_name(step)
    try:
        return _read_head(run_fd, name, step, f"{run}/{name}")
    except CheckpointCorruptError:
        return None


def highest_term(run_fd: int) -> int:
    """Return the highest claimed term of a run, 0 where none is.

    Raises:
        OSError: The directory cannot be listed.
    """
    with os.scandir(run_fd) as entries:
        return max((parse_term(entry.name) or 0 for entry in entries), default=0)
