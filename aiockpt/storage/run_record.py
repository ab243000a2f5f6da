"""Whose directory a run directory is: its record, and what is refused without one."""

from __future__ import annotations

import os
import uuid

import msgspec

from aiockpt.errors import ConfigError
from aiockpt.format.manifest import FORMAT_VERSION
from aiockpt.format.names import (
    LOCK_NAME,
    MANIFEST_NAME,
    RUN_RECORD_NAME,
    parse_attempt,
    parse_bad,
    parse_meet,
    parse_old,
    parse_step,
    parse_term,
)
from aiockpt.storage.direct import sync_dir
from aiockpt.storage.failures import refused, storage_errors
from aiockpt.storage.run_directory import open_run

__all__ = ["RunRecord", "check_run", "make_directory", "make_record", "read_record"]

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OPEN_RECORD = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO of that name must not hang us
_HARMLESS = {"lost+found", LOCK_NAME}
_UNFINISHED = f".{RUN_RECORD_NAME}."
"""Prefix of a record that is being written."""
_OUR_PREFIXES = (_UNFINISHED, ".trash.")


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """``aiockpt.json``."""

    format: int
    run_id: str


def make_directory(run: str) -> None:
    """Make a directory and its parents, durably: a checkpoint in a directory that a power loss removes is none.

    Raises:
        ConfigError: A part of the path is a file.
        StorageError: It cannot be made.
    """
    missing: list[str] = []
    path = run
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    with storage_errors("a run directory was not made", run):
        try:
            for path in reversed(missing):
                _make_one(path)
        except NotADirectoryError as exc:
            raise refused(run, "a part of its path is a file", "give the path of a directory") from exc


def _make_one(path: str) -> None:
    try:
        os.mkdir(path)
    except FileExistsError:  # another job of ours was faster
        return
    fd = os.open(os.path.dirname(path), _OPEN_DIRECTORY)
    try:
        sync_dir(fd)
    finally:
        os.close(fd)


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
            record = read_record(run_fd, run)
            if record is None:
                _refuse_foreign(run_fd, run)
            return record
    finally:
        os.close(run_fd)


def read_record(run_fd: int, run: str) -> RunRecord | None:
    """Return a run's record, None where it has none.

    Raises:
        ConfigError: It is none of ours, or of a newer format.
        OSError: It cannot be read.
    """
    try:
        fd = os.open(RUN_RECORD_NAME, _OPEN_RECORD, dir_fd=run_fd)
    except FileNotFoundError:
        return None
    try:
        data = os.read(fd, 4096)
    finally:
        os.close(fd)
    try:
        version = int(bytes(msgspec.json.decode(data, type=dict[str, msgspec.Raw])["format"]))
        if version <= FORMAT_VERSION:
            return msgspec.json.decode(data, type=RunRecord)
    except (msgspec.DecodeError, KeyError, ValueError, RecursionError) as exc:
        raise refused(run, f"its {RUN_RECORD_NAME} is none of ours ({exc})", "choose another directory") from exc
    raise ConfigError(
        f"the run {run} has format {version}, this aiockpt reads up to {FORMAT_VERSION}",
        why="it was written by a newer aiockpt",
        next="upgrade aiockpt, or choose another run directory",
        argument="run",
        path=run,
    )


def _refuse_foreign(run_fd: int, run: str) -> None:
    with os.scandir(run_fd) as entries:
        names = sorted(entry.name for entry in entries)
    foreign = [repr(name) for name in names if not _is_ours(run_fd, name)]
    if foreign:
        some = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise refused(
            run,
            f"it has no {RUN_RECORD_NAME} and holds {some}: it seems to be another program's",
            "give an empty or a new directory, such as a folder inside it",
        )


def _is_ours(run_fd: int, name: str) -> bool:
    if name in _HARMLESS or name.startswith(_OUR_PREFIXES):
        return True
    if parse_step(name) is not None:  # copied here without the record; others name their folders so, too
        return os.access(f"{name}/{MANIFEST_NAME}", os.F_OK, dir_fd=run_fd)
    return any(parse(name) is not None for parse in (parse_term, parse_attempt, parse_old, parse_bad, parse_meet))


def make_record(run_fd: int) -> RunRecord:
    """Write the record of a new run, durably; only whoever holds the run's lock may do so.

    Raises:
        OSError: As the file system says.
    """
    with os.scandir(run_fd) as entries:
        for name in [entry.name for entry in entries if entry.name.startswith(_UNFINISHED)]:
            os.unlink(name, dir_fd=run_fd)
    record = RunRecord(format=FORMAT_VERSION, run_id=str(uuid.uuid4()))
    unfinished = _UNFINISHED + record.run_id
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=run_fd)
    try:
        os.write(fd, msgspec.json.encode(record) + b"\n")
        os.fdatasync(fd)
    finally:
        os.close(fd)
    os.rename(unfinished, RUN_RECORD_NAME, src_dir_fd=run_fd, dst_dir_fd=run_fd)
    sync_dir(run_fd)
    return record
