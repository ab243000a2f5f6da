"""The commit: an attempt's directories become ``step-N``, whole or not at all.

Every function works through the descriptor of the run directory, so that a run that is renamed meanwhile, or a path
that is mounted over, is never mixed with another.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Iterable

from aiockpt.errors import CommitUnknownError, StepExistsError
from aiockpt.format.names import MANIFEST_NAME, old_name, parse_old, step_name, trash_name
from aiockpt.storage.direct import sync_dir, write_small
from aiockpt.storage.failures import NO_LOCKS, FencedError, storage_errors
from aiockpt.storage.faults import NO_FAULTS, FaultPoint, Faults
from aiockpt.storage.run_directory import Committed, find_committed, highest_term

__all__ = ["join_attempt", "make_attempt", "publish", "remove_tree", "retire", "to_trash", "write_manifest"]

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def make_attempt(run_fd: int, name: str, folders: Iterable[str], *, faults: Faults = NO_FAULTS) -> int:
    """Make an attempt's directories; returns the descriptor of the outer one, which the caller closes.

    Args:
        run_fd: The run directory.
        name: ``format.names.attempt_name``; a name is never used twice.
        folders: Names directly in the attempt.
        faults: Fault layer.

    Raises:
        StorageError: What stands may be removed by ``remove_tree``.
    """
    with storage_errors("an attempt's directory was not made", name, fd=run_fd):
        os.mkdir(name, dir_fd=run_fd)
        fd = os.open(name, _OPEN_DIRECTORY, dir_fd=run_fd)
        try:
            for folder in folders:
                os.mkdir(folder, dir_fd=fd)
            faults.at(FaultPoint.WORKER_ATTEMPT_MADE, name)
        except BaseException:
            os.close(fd)
            raise
    return fd


def join_attempt(run_fd: int, name: str, folders: Iterable[str], *, faults: Faults = NO_FAULTS) -> int:
    """Open an attempt that another rank made; returns the descriptor of the outer directory, which the caller closes.

    Folders are made by whoever comes first: rank 0 does not know those that only other ranks have.

    Raises:
        StorageError: ENOENT is an attempt that was moved away.
    """
    with storage_errors("an attempt's directory was not opened", name, fd=run_fd):
        fd = os.open(name, _OPEN_DIRECTORY, dir_fd=run_fd)
        try:
            for folder in folders:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder, dir_fd=fd)
            faults.at(FaultPoint.WORKER_ATTEMPT_MADE, name)
        except BaseException:
            os.close(fd)
            raise
    return fd


def write_manifest(attempt_fd: int, data: bytes, folders: Iterable[str], *, faults: Faults = NO_FAULTS) -> None:
    """Write the manifest, the last file of an attempt, then make its directories' entries durable.

    Raises:
        StorageError: The attempt may not be published.
    """
    write_small(attempt_fd, MANIFEST_NAME, data, faults=faults)
    with storage_errors("an attempt's directory was not synced", "", fd=attempt_fd):
        for folder in folders:
            fd = os.open(folder, _OPEN_DIRECTORY, dir_fd=attempt_fd)
            try:
                sync_dir(fd)
            finally:
                os.close(fd)
        sync_dir(attempt_fd)
        faults.at(FaultPoint.WORKER_MANIFEST_DURABLE, MANIFEST_NAME)


def publish(
    run_fd: int,
    attempt: str,
    *,
    run: str,
    step: int,
    save_id: str,
    term: int,
    overwrite: bool,
    faults: Faults = NO_FAULTS,
) -> tuple[Committed, list[str]]:
    """Rename a durable attempt to ``step-N``; doing it again is harmless, also for another worker.

    Args:
        run_fd: The run directory.
        attempt: Name of the attempt's directory in it.
        run: Absolute path of the run directory, for the result and for messages.
        step: Training step.
        save_id: As the attempt's manifest has it.
        term: Of the claim under which this worker writes.
        overwrite: Replace another checkpoint of this step.
        faults: Fault layer.

    Returns:
        What stands now, and names in the run that ``remove_tree`` may remove.

    Raises:
        FencedError: A higher term is claimed, or somebody moved the attempt away. Nothing was published.
        StepExistsError: The step stands and may not be replaced. Nothing was published.
        StorageError: Nothing was published; what stood stands, or the next claim of the run puts it back.
        CommitUnknownError: The rename was done, its durability is not known.
    """
    name = step_name(step)
    standing = find_committed(run_fd, run, step)
    if standing is None or standing.save_id != save_id:
        with storage_errors("a checkpoint was not published", f"{run}/{name}"):
            _refuse_fenced(run_fd, run, step, term)
            faults.at(FaultPoint.WORKER_BEFORE_RENAME, name)
            _move_in(run_fd, attempt, run=run, step=step, save_id=save_id, overwrite=overwrite, faults=faults)
        # Here is the point of no return: the rename is done.
    try:
        faults.at(FaultPoint.WORKER_AFTER_RENAME, name)
        sync_dir(run_fd)
        faults.at(FaultPoint.WORKER_RUN_SYNCED, name)
    except OSError as exc:
        what = f"step {step} was published, and nobody can say whether a power loss would undo it"
        raise _unknown(run, step, what, f"{run} was not synced after the rename: {exc}") from exc
    committed = find_committed(run_fd, run, step)
    if committed is None:
        raise _unknown(run, step, f"step {step} was published and is gone", "somebody else works in the run directory")
    try:
        old = to_trash(run_fd, old_name(step, save_id))
    except OSError:  # the commit stands; the next claim of the run puts the old one away
        old = None
    return committed, [old] if old else []


def _unknown(run: str, step: int, what: str, why: str) -> CommitUnknownError:
    return CommitUnknownError(
        what,
        why=why,
        next="look with steps() after the next start; save again before relying on it",
        step=step,
        path=f"{run}/{step_name(step)}",
    )


def _refuse_fenced(run_fd: int, run: str, step: int, term: int) -> None:
    highest = highest_term(run_fd)
    if highest > term:
        raise FencedError(
            f"step {step} was not published",
            why=f"another job claimed the run {run} (term {highest}, this one has {term})",
            next="end one of the two jobs",
            errno=errno.ESTALE,
            path=run,
            step=step,
        )


def _move_in(run_fd: int, attempt: str, *, run: str, step: int, save_id: str, overwrite: bool, faults: Faults) -> None:
    name, aside = step_name(step), old_name(step, save_id)
    moved = False
    try:
        if os.access(name, os.F_OK, dir_fd=run_fd, follow_symlinks=False):
            if not overwrite:
                raise _exists(run, step)
            # A former try of this save may have left one there; as the step stands, nobody needs it.
            to_trash(run_fd, aside)
            os.rename(name, aside, src_dir_fd=run_fd, dst_dir_fd=run_fd)
            moved = True
            faults.at(FaultPoint.WORKER_OLD_ASIDE, name)
        os.rename(attempt, name, src_dir_fd=run_fd, dst_dir_fd=run_fd)
    except OSError as exc:
        if moved:
            _put_back(run_fd, aside, name)
        if exc.errno in (errno.ENOTEMPTY, errno.EEXIST) and not isinstance(exc, StepExistsError):
            raise _exists(run, step) from exc
        if exc.errno == errno.ENOENT:
            raise FencedError(
                f"step {step} was not published",
                why=f"its attempt {attempt} was moved away",
                next="look for another job on this run",
                errno=errno.ENOENT,
                path=f"{run}/{attempt}",
                step=step,
            ) from exc
        raise


def _put_back(run_fd: int, aside: str, name: str) -> None:
    """Undo the step aside; where a later try of the same save was faster, its checkpoint stays."""
    try:
        os.rename(aside, name, src_dir_fd=run_fd, dst_dir_fd=run_fd)
    except OSError as exc:
        if exc.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise


def _exists(run: str, step: int) -> StepExistsError:
    path = f"{run}/{step_name(step)}"
    return StepExistsError(
        f"step {step} was not published: {path} is there",
        why="a committed checkpoint is never written into again",
        next="save with overwrite=True, or save another step",
        step=step,
        path=path,
    )


def to_trash(run_fd: int, name: str) -> str | None:
    """Rename something of the run to a ``.trash.`` name; None where it is not there.

    Raises:
        OSError: The rename failed otherwise.
    """
    trash = trash_name(f"{name.lstrip('.')}.{secrets.token_hex(8)}")
    try:
        os.rename(name, trash, src_dir_fd=run_fd, dst_dir_fd=run_fd)
    except FileNotFoundError:
        return None
    return trash


def retire(run_fd: int, name: str, *, faults: Faults = NO_FAULTS) -> str | None:
    """Take a committed checkpoint out of the run, unless somebody reads it.

    Its manifest is locked exclusively while it is renamed, so a reader either holds its own lock before (and the
    checkpoint is left) or finds the path gone. The rename is made durable before anything of it may be deleted: a
    power loss must not bring back a checkpoint with holes.

    Returns:
        The name under which ``remove_tree`` removes it; None where it is being read, or is not there.

    Raises:
        StorageError: It stands, or nobody can say whether a power loss would bring it back; all of its files are there.
    """
    with storage_errors("a checkpoint was not removed", name, fd=run_fd):
        faults.at(FaultPoint.WORKER_PRUNE, name)
        try:
            # For writing, because NFS gives an exclusive lock to no other descriptor; nothing is written.
            fd = os.open(f"{name}/{MANIFEST_NAME}", os.O_RDWR | os.O_CLOEXEC, dir_fd=run_fd)
        except FileNotFoundError:
            gone = _take_out(run_fd, name)
        else:
            try:
                gone = _take_out(run_fd, name) if _lock_exclusive(fd) else None
            finally:
                os.close(fd)
        if gone is not None:
            sync_dir(run_fd)
        return gone


def _take_out(run_fd: int, name: str) -> str | None:
    """Rename a step away; first what it had replaced and a death left aside, which is not to come back for it."""
    with os.scandir(run_fd) as entries:
        names = [entry.name for entry in entries]
    if name in names:
        for other in names:
            old = parse_old(other)
            if old is not None and step_name(old.step) == name:
                to_trash(run_fd, other)
    return to_trash(run_fd, name)


def _lock_exclusive(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as exc:
        if exc.errno not in NO_LOCKS:
            raise
        # Readers have no lock here either. What they opened they can read to its end; keeping all would fill the disk.
    return True


def remove_tree(run_fd: int, name: str, *, faults: Faults = NO_FAULTS) -> bool:
    """Remove a directory of the run and all in it, without following links; False where it is not there.

    Raises:
        StorageError: Some of it stands.
    """
    with storage_errors("a directory was not removed", name, fd=run_fd):
        faults.at(FaultPoint.WORKER_REMOVE, name)
        return _remove(run_fd, name)


def _remove(dir_fd: int, name: str) -> bool:
    """Remove a name and what is below it; what others remove at the same time is not missed."""
    # Our own, because shutil.rmtree fails where another process removes a part of the same tree.
    try:
        fd = os.open(name, _OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=dir_fd)
    except FileNotFoundError:
        return False
    except OSError as exc:
        if exc.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        return _unless_missing(os.unlink, name, dir_fd)
    try:
        with os.scandir(fd) as entries:
            names = [entry.name for entry in entries]
        for below in names:
            _remove(fd, below)
    finally:
        os.close(fd)
    return _unless_missing(os.rmdir, name, dir_fd)


def _unless_missing(remove: Callable[..., None], name: str, dir_fd: int) -> bool:
    try:
        remove(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return False
    return True
