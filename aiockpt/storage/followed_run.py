"""A run that another rank has taken: what every rank but the first has in place of a claim."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Self

from aiockpt.errors import ConfigError
from aiockpt.storage.failures import storage_errors
from aiockpt.storage.run_directory import Committed, Unreadable, find_committed, open_run
from aiockpt.storage.run_record import read_record

__all__ = ["FollowedRun"]

_log = logging.getLogger("aiockpt.run")

_FIRST_WAIT, _LONGEST_WAIT = 0.05, 1.0
_NOT_YET = frozenset((errno.ENOENT, errno.ESTALE))
"""What a client of a network file system may still believe of a name that another host has just made."""


class FollowedRun:
    """The run as a rank sees it that writes only where it is told to; made by ``check``.

    It has what a ``RunClaim`` has, and moves nothing: rank 0 does. It holds no descriptor, so that each look asks the
    file system anew: a client of NFS believes what it knows until a directory is opened again.

    Thread-safety: every method may block on the disk; any thread.
    """

    run: str
    """Absolute path."""
    run_id: str
    term: int
    """Of rank 0's claim."""

    def __init__(self, run: str, run_id: str, term: int) -> None:
        self.run = run
        self.run_id = run_id
        self.term = term
        self.checkpoints: list[Committed] = []
        """Always empty, as are ``bad`` and ``trash``: rank 0 decides by what it sees."""
        self.bad: list[Unreadable] = []
        self.trash: list[str] = []
        self.highest_ordinal = 0

    @classmethod
    def check(
        cls,
        run: str,
        *,
        run_id: str,
        term: int,
        meet: str,
        timeout: float = 60.0,
        on_wait: Callable[[str], None] | None = None,
    ) -> Self:
        """See that a directory is the one that rank 0 has taken. Blocks.

        Args:
            run: Path of the run directory, as this rank was told.
            run_id: Of rank 0's run.
            term: Of rank 0's claim.
            meet: Name of the file that rank 0 has made in it, ``RunClaim.make_meet``.
            timeout: Seconds that the file may take to be seen here; by default what NFS may remember of a name.
            on_wait: Called at each turn of waiting with what is waited for; what it raises ends it.

        Raises:
            ConfigError: It is another directory.
            StorageError: It cannot be read.
        """
        run = os.path.abspath(run)
        deadline = time.monotonic() + timeout
        wait = _FIRST_WAIT
        while (missing := _missing(run, run_id, meet)) is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise _not_shared(run, missing, timeout)
            if on_wait is not None:
                on_wait(f"the run {run} is not seen on this host as rank 0 has it")
            threading.Event().wait(min(wait, left))
            wait = min(2 * wait, _LONGEST_WAIT)
        return cls(run, run_id, term)

    def find(self, step: int, save_id: str) -> Committed | None:
        """Return ``step-N`` where it stands now and is that of this save.

        None is no proof that it does not stand: over a network file system it may be seen here a minute later.

        Raises:
            StorageError: It cannot be read.
        """
        with storage_errors("a checkpoint was not looked for", self.run):
            run_fd = open_run(self.run)
            try:
                known = find_committed(run_fd, self.run, step)
            finally:
                os.close(run_fd)
        return known if known is not None and known.save_id == save_id else None

    def fence(self, attempt: str) -> bool:
        """Nothing: rank 0 moves attempts away; False, as where there is none."""
        return False

    def mark_bad(self, checkpoint: Committed | Unreadable, why: str) -> str:
        """Only say so on this rank, too: rank 0 renames it. Returns its path as it was."""
        _log.warning("step %d is damaged, rank 0 puts it aside: %s", checkpoint.step, why)
        return checkpoint.path

    def release(self) -> None:
        """Nothing: there is nothing to let go of."""

    def forget_in_child(self) -> None:
        """Nothing, likewise."""


def _missing(run: str, run_id: str, meet: str) -> str | None:
    """Return what is not there (yet) of what rank 0 sees, None where all is."""
    with storage_errors("a run directory was not read", run):
        try:
            run_fd = os.open(run, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.stat(meet, dir_fd=run_fd, follow_symlinks=False)
                record = read_record(run_fd, run)
            finally:
                os.close(run_fd)
        except NotADirectoryError:
            return "on this host it is a file, or a part of its path is one"
        except OSError as exc:
            if exc.errno not in _NOT_YET:
                raise
            return f"a file that rank 0 has made in it ({meet}) is not seen here"
    if record is None:
        return "it has no record here"
    if record.run_id != run_id:
        return f"it holds run {record.run_id} here, and run {run_id} for rank 0"
    return None


def _not_shared(run: str, missing: str, timeout: float) -> ConfigError:
    return ConfigError(
        f"the run directory is not shared between the ranks' hosts: {run}",
        why=f"on host {socket.gethostname()} {missing}, after {timeout:g} s",
        next="give a path that leads to one directory on all hosts: a network file system mounted alike, no local disk",
        argument="run",
        path=run,
    )
