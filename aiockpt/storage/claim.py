"""Taking a run for one trainer, and what the trainer may move in it."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import uuid
from collections.abc import Callable
from datetime import UTC, datetime

from aiockpt.format.names import (
    bad_name,
    meet_name,
    old_name,
    parse_attempt,
    parse_meet,
    parse_old,
    parse_term,
    step_name,
    term_name,
)
from aiockpt.storage.commit import to_trash
from aiockpt.storage.direct import sync_dir
from aiockpt.storage.failures import storage_error, storage_errors
from aiockpt.storage.faults import NO_FAULTS, FaultPoint, Faults
from aiockpt.storage.locks import RunLock
from aiockpt.storage.run_directory import (
    Committed,
    Scan,
    Unreadable,
    find_committed,
    highest_term,
    open_run,
    scan,
)
from aiockpt.storage.run_record import check_run, make_directory, make_record

__all__ = ["RunClaim"]

_log = logging.getLogger("aiockpt.run")

_LINGER_SLACK = 5.0
"""Seconds beyond ``linger_timeout``, after which a former job's worker is taken for stuck."""


class RunClaim:
    """A run that this process writes; made by ``take``.

    Thread-safety: every method may block on the disk, and they are called from one thread at a time.
    """

    run: str
    """Absolute path."""
    run_id: str
    term: int
    checkpoints: list[Committed]
    """As they stood at the claim, newest first."""
    bad: list[Unreadable]
    """Directories that are named as checkpoints and have no usable head."""
    highest_ordinal: int
    """Of all checkpoints at the claim; 0 where there is none."""
    trash: list[str]
    """Names in the run that the worker may remove."""

    def __init__(self, run: str, run_fd: int, lock: RunLock, faults: Faults) -> None:
        self.run = run
        self.run_id = ""
        self.term = 0
        self.checkpoints = []
        self.bad = []
        self.highest_ordinal = 0
        self.trash = []
        self._run_fd = run_fd
        self._lock = lock
        self._faults = faults
        self._meet = ""
        """The file that other ranks look for."""

    @classmethod
    def take(
        cls,
        run: str,
        *,
        linger_timeout: float | None,
        lock_timeout: float = 5.0,
        on_wait: Callable[[str], None] | None = None,
        faults: Faults = NO_FAULTS,
    ) -> RunClaim:
        """Make the directory where it is missing, and take the run. Blocks.

        Args:
            run: Path of the run directory.
            linger_timeout: Seconds that a former job's worker may take to finish its save; None is no limit.
            lock_timeout: Seconds to wait for a former job's own end.
            on_wait: Called at each turn of waiting (every 20 ms) with what is waited for; what it raises ends it.
            faults: Fault layer.

        Raises:
            ConfigError: The directory is a file, another program's, of a newer format, or taken.
            StorageError: The operating system refused something.
        """
        run = os.path.abspath(run)
        make_directory(run)
        record = check_run(run)
        run_fd = open_run(run)
        try:
            with storage_errors("a run was not locked", run):
                lock = RunLock.take(run_fd, run, timeout=lock_timeout, on_wait=on_wait)
        except BaseException:
            os.close(run_fd)
            raise
        claim = cls(run, run_fd, lock, faults)
        try:
            with storage_errors("a run was not taken", run):
                record = record or check_run(run) or make_record(run_fd)
                claim.run_id = record.run_id
                lock.write_owner(record.run_id, datetime.now(UTC).isoformat(timespec="seconds"))
                claim._wait_for_predecessor(linger_timeout, on_wait)
                faults.at(FaultPoint.TRAINER_TAKING_RUN, run)
                claim._claim_term(highest_term(run_fd) + 1)
                claim._put_away()
                claim._adopt(scan(run))
        except BaseException:
            claim.release()
            raise
        return claim

    def _wait_for_predecessor(self, linger_timeout: float | None, on_wait: Callable[[str], None] | None) -> None:
        if self._lock.wait_attempts(0):
            return
        _log.info("waiting for a former job's worker, which finishes its save in %s", self.run)
        timeout = None if linger_timeout is None else linger_timeout + _LINGER_SLACK
        if not self._lock.wait_attempts(timeout, on_wait):
            _log.warning(
                "a former job's worker still has a save open in %s after %g s; going on without it, "
                "its save will not be committed. Look for a process that hangs on this file system",
                self.run,
                timeout,
            )

    def _claim_term(self, term: int) -> None:
        while True:
            try:
                fd = os.open(
                    term_name(term), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=self._run_fd
                )
            except FileExistsError:  # another job, over a file system whose locks do not reach
                term += 1
                continue
            break
        os.close(fd)
        self.term = term
        sync_dir(self._run_fd)
        with os.scandir(self._run_fd) as entries:
            lower = [entry.name for entry in entries if (other := parse_term(entry.name)) and other < term]
        for name in lower:
            try:
                os.unlink(name, dir_fd=self._run_fd)
            except FileNotFoundError:
                continue

    def _put_away(self) -> None:
        """Attempts of others to trash, replaced checkpoints back where nothing took their place."""
        with os.scandir(self._run_fd) as entries:
            names = sorted(entry.name for entry in entries)
        self.trash = [name for name in names if name.startswith(".trash.")]
        for name in names:
            if parse_attempt(name) is not None:
                self._to_trash(name)
            elif parse_meet(name) is not None:
                with contextlib.suppress(FileNotFoundError):  # its owner lets go, over a file system without locks
                    os.unlink(name, dir_fd=self._run_fd)
        for name, step in self._replaced(names):
            if step_name(step) in names:
                self._to_trash(name)
            else:
                os.rename(name, step_name(step), src_dir_fd=self._run_fd, dst_dir_fd=self._run_fd)
                names.append(step_name(step))
        sync_dir(self._run_fd)

    def _replaced(self, names: list[str]) -> list[tuple[str, int]]:
        """Return replaced checkpoints and their steps, the newest first: of several of one step it comes back."""
        found = []
        for name in names:
            old = parse_old(name)
            if old is not None:
                known = find_committed(self._run_fd, self.run, old.step, name=name)
                found.append(((known.term, known.ordinal) if known else (-1, -1), name, old.step))
        return [(name, step) for _, name, step in sorted(found, reverse=True)]

    def _to_trash(self, name: str) -> None:
        trash = to_trash(self._run_fd, name)
        if trash is not None:
            self.trash.append(trash)

    def _adopt(self, found: Scan) -> None:
        self.checkpoints, self.bad = found
        seen = max((known.term for known in self.checkpoints), default=0)
        if seen >= self.term:  # checkpoints of another run were copied into this one, or its terms got lost
            self._claim_term(seen + 1)
        self.highest_ordinal = max((known.ordinal for known in self.checkpoints), default=0)

    def make_meet(self) -> str:
        """Make the file by which other ranks see that this is their directory, too; once, it goes with the claim.

        Returns:
            Its name in the run, which nobody can know who was not told.

        Raises:
            StorageError: It cannot be made.
        """
        name = meet_name(secrets.token_hex(16))
        with storage_errors("a file for the ranks to meet at was not made", f"{self.run}/{name}"):
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=self._run_fd))
        self._meet = name
        return name

    def find(self, step: int, save_id: str) -> Committed | None:
        """Return ``step-N`` where it stands now and is that of this save.

        Raises:
            StorageError: It cannot be read.
        """
        with storage_errors("a checkpoint was not looked for", self.run):
            known = find_committed(self._run_fd, self.run, step)
        return known if known is not None and known.save_id == save_id else None

    def fence(self, attempt: str) -> bool:
        """Move an attempt away, so that no late rename of its worker finds it; False where it is not there.

        A checkpoint that it was to replace comes back where it had put that aside, so that the run never lacks it.

        Raises:
            StorageError: It may still be published.
        """
        try:
            trash = to_trash(self._run_fd, attempt)
        except OSError as exc:
            raise storage_error("an attempt was not moved away", exc, path=f"{self.run}/{attempt}") from exc
        if trash is not None:
            self.trash.append(trash)
        self._put_straight(attempt)
        return trash is not None

    def _put_straight(self, attempt: str) -> None:
        parts = parse_attempt(attempt)
        assert parts is not None, "the caller names an attempt"
        name, aside = step_name(parts.step), old_name(parts.step, parts.save_id)
        try:
            if not self._stands(aside):
                return
            if self._stands(name):  # the attempt was published
                self._to_trash(aside)
            else:
                os.rename(aside, name, src_dir_fd=self._run_fd, dst_dir_fd=self._run_fd)
                sync_dir(self._run_fd)
        except OSError as exc:
            _log.warning(
                "step %d is not there until the run is opened again: %s stands aside: %s", parts.step, aside, exc
            )

    def _stands(self, name: str) -> bool:
        return os.access(name, os.F_OK, dir_fd=self._run_fd, follow_symlinks=False)

    def mark_bad(self, checkpoint: Committed | Unreadable, why: str) -> str:
        """Rename a checkpoint that was found bad, so that nobody takes it for one; it is kept until it is removed.

        Args:
            checkpoint: One of ``checkpoints`` or ``bad``; it leaves these lists.
            why: For the log.

        Returns:
            Its new path.

        Raises:
            StorageError: It stands under its old name, or is gone.
        """
        own_id = checkpoint.save_id if isinstance(checkpoint, Committed) else str(uuid.uuid4())
        name = bad_name(checkpoint.step, own_id)
        with storage_errors("a bad checkpoint was not renamed", checkpoint.path):
            os.rename(os.path.basename(checkpoint.path), name, src_dir_fd=self._run_fd, dst_dir_fd=self._run_fd)
            sync_dir(self._run_fd)
        self.checkpoints = [known for known in self.checkpoints if known.path != checkpoint.path]
        self.bad = [known for known in self.bad if known.path != checkpoint.path]
        _log.warning("step %d is damaged, it was renamed to %s: %s", checkpoint.step, name, why)
        return f"{self.run}/{name}"

    def release(self) -> None:
        """Let go of the run; idempotent, and nothing happens in a forked child."""
        meet, self._meet = self._meet, ""
        if meet:
            with contextlib.suppress(OSError):  # the next claim removes it
                os.unlink(meet, dir_fd=self._run_fd)
        self._lock.release()
        fd, self._run_fd = self._run_fd, -1
        if fd >= 0:
            os.close(fd)

    def forget_in_child(self) -> None:
        """Close what a forked child got a copy of; the parent's claim stands."""
        self._lock.forget_in_child()
        self._meet = ""
        fd, self._run_fd = self._run_fd, -1
        if fd >= 0:
            os.close(fd)
