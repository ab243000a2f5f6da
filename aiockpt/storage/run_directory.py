"""What stands in a run directory: its record, its committed checkpoints, its terms."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from aiockpt.errors import CheckpointCorruptError, ConfigError
from aiockpt.format.manifest import FORMAT_VERSION, HEAD_NBYTES, parse_head
from aiockpt.format.names import (
    LOCK_NAME,
    MANIFEST_NAME,
    RUN_RECORD_NAME,
    parse_attempt,
    parse_bad,
    parse_old,
    parse_step,
    parse_term,
    step_name,
)
from aiockpt.storage.direct import sync_dir
from aiockpt.storage.failures import storage_error, storage_errors

__all__ = [
    "Committed",
    "RunRecord",
    "Scan",
    "Unreadable",
    "check_run",
    "find_committed",
    "highest_term",
    "make_record",
    "open_run",
    "scan",
]

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OPEN_HEAD = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO of that name must not hang the scan
_NOT_OURS_YET_FINE = {"lost+found", RUN_RECORD_NAME, LOCK_NAME}
_RECORD_PREFIX = f".{RUN_RECORD_NAME}."  # of a record that is being written
_TRASH_PREFIX = ".trash."


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
    """A directory that is named as a checkpoint and has no usable head."""

    step: int
    path: str
    why: str


class Scan(NamedTuple):
    """The checkpoints of a run."""

    checkpoints: list[Committed]
    """Newest first, by (term, ordinal)."""
    unreadable: list[Unreadable]
    """By step, highest first."""


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """``aiockpt.json``: whose directory this is."""

    format: int
    run_id: str


def scan(run: str) -> Scan:
    """List the checkpoints of a run directory by the first bytes of their manifests.

    Raises:
        StorageError: The directory, or a manifest in it, cannot be read; that is no proof of corruption.
        ConfigError: The run is not there, or a checkpoint is of a newer format.
    """
    run_fd = open_run(run)
    try:
        with storage_errors("a run was not listed", run):
            return _scan(run_fd, os.path.abspath(run))
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
    manifest = f"{name}/{MANIFEST_NAME}"
    try:
        fd = os.open(manifest, _OPEN_HEAD, dir_fd=run_fd)
        try:
            data = os.read(fd, HEAD_NBYTES)
        finally:
            os.close(fd)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as exc:
        if not _stands(run_fd, name):
            return None
        why = f"it has no {MANIFEST_NAME}" if exc.errno == errno.ENOENT else str(exc)
        raise CheckpointCorruptError(f"{path} is no checkpoint", why=why, file=f"{path}/{MANIFEST_NAME}") from exc
    except OSError as exc:
        raise storage_error("a manifest was not read", exc, path=f"{path}/{MANIFEST_NAME}") from exc
    head = parse_head(data, file=f"{path}/{MANIFEST_NAME}")
    if head.step != step:
        raise CheckpointCorruptError(f"{path} is no checkpoint", why=f"its manifest is that of step {head.step}")
    return Committed(step, head.term, head.ordinal, head.save_id, head.nbytes, path)


def _stands(run_fd: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=run_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def find_committed(run_fd: int, run: str, step: int) -> Committed | None:
    """Return the checkpoint that stands as ``step-N``, None where none does or it has no usable head."""
    try:
        return _read_head(run_fd, step_name(step), step, f"{run}/{step_name(step)}")
    except CheckpointCorruptError:
        return None


def highest_term(run_fd: int) -> int:
    """Return the highest claimed term of a run, 0 where none is.

    Raises:
        OSError: The directory cannot be listed.
    """
    with os.scandir(run_fd) as entries:
        return max((parse_term(entry.name) or 0 for entry in entries), default=0)


def open_run(run: str) -> int:
    """Open the directory of a run that exists; the caller closes the descriptor.

    Raises:
        ConfigError: It is not there, or is no directory.
        StorageError: It cannot be opened.
    """
    try:
        return os.open(run, _OPEN_DIRECTORY)
    except FileNotFoundError as exc:
        raise _refuse(run, "it does not exist", "check the path") from exc
    except NotADirectoryError as exc:
        raise _refuse(run, "it is a file, or a part of its path is one", "give the path of a directory") from exc
    except OSError as exc:
        raise storage_error("a run directory was not opened", exc, path=run) from exc


def check_run(run: str) -> RunRecord | None:
    """Check that a directory is a run of a format that we read, or could become one; writes nothing.

    Returns:
        Its record; None where it has none yet (empty, or with nothing but our own files).

    Raises:
        ConfigError: It is missing, no directory, another program's, or of a newer format.
        StorageError: It cannot be read.
    """
    run_fd = open_run(run)
    try:
        with storage_errors("a run directory was not read", run):
            record = _read_record(run_fd, run)
            if record is None:
                _refuse_foreign(run_fd, run)
            return record
    finally:
        os.close(run_fd)


def _read_record(run_fd: int, run: str) -> RunRecord | None:
    try:
        fd = os.open(RUN_RECORD_NAME, _OPEN_HEAD, dir_fd=run_fd)
    except FileNotFoundError:
        return None
    try:
        data = os.read(fd, 4096)
    finally:
        os.close(fd)
    try:
        version = msgspec.json.decode(data, type=dict[str, msgspec.Raw])["format"]
        if int(bytes(version)) > FORMAT_VERSION:
            raise ConfigError(
                f"the run {run} has format {int(bytes(version))}, this aiockpt reads up to {FORMAT_VERSION}",
                why="it was written by a newer aiockpt",
                next="upgrade aiockpt, or choose another run directory",
                argument="run",
                path=run,
            )
        return msgspec.json.decode(data, type=RunRecord)
    except ConfigError:
        raise
    except (msgspec.DecodeError, KeyError, ValueError) as exc:
        raise _refuse(run, f"its {RUN_RECORD_NAME} is none of ours: {exc}", "choose another directory") from exc


def _refuse_foreign(run_fd: int, run: str) -> None:
    with os.scandir(run_fd) as entries:
        names = sorted(entry.name for entry in entries)
    foreign = [name for name in names if not _is_ours(run_fd, name)]
    if foreign:
        raise _refuse(
            run,
            f"it has no {RUN_RECORD_NAME} and holds {_some(foreign)}: it seems to be another program's",
            "give an empty or new directory, such as a folder inside it",
        )


def _is_ours(run_fd: int, name: str) -> bool:
    if name in _NOT_OURS_YET_FINE or name.startswith((_RECORD_PREFIX, _TRASH_PREFIX)):
        return True
    if parse_step(name) is not None:
        return _stands(run_fd, f"{name}/{MANIFEST_NAME}")  # a copy of checkpoints without the record
    return any(parse(name) is not None for parse in (parse_term, parse_attempt, parse_old, parse_bad))


def _some(names: Iterable[str]) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def make_record(run_fd: int) -> RunRecord:
    """Write the record of a new run; only whoever holds the run's lock may do so.

    Raises:
        OSError: As the file system says.
    """
    record = RunRecord(format=FORMAT_VERSION, run_id=str(uuid.uuid4()))
    temporary = f"{_RECORD_PREFIX}{record.run_id}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=run_fd)
    try:
        os.write(fd, msgspec.json.encode(record) + b"\n")
        os.fdatasync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, RUN_RECORD_NAME, src_dir_fd=run_fd, dst_dir_fd=run_fd)
    sync_dir(run_fd)
    return record


def _refuse(run: str, why: str, next: str) -> ConfigError:
    return ConfigError(f"{run} cannot be used as a run directory", why=why, next=next, argument="run", path=run)
