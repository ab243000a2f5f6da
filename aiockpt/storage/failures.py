"""An errno as a ``StorageError``: what was tried, why it failed, what to do now."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from aiockpt.errors import CheckpointError, ConfigError, StorageError

__all__ = ["NO_LOCKS", "FencedError", "path_of", "refused", "storage_error", "storage_errors"]

_ANYTHING = "look at the path and its file system, then try again"
_NEXT = {
    errno.ENOSPC: "free space on this file system, then save again",
    errno.EDQUOT: "free some of your quota, then save again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or use another file system",
    errno.EROFS: "remount the file system for writing, or choose another run directory",
    errno.EACCES: "give this user access to the path, or choose another run directory",
    errno.EPERM: "give this user access to the path, or choose another run directory",
    errno.EIO: "look at the kernel's log (dmesg) for the disk's errors before trusting it again",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the system is out of file handles: end some programs",
    errno.ESTALE: "the server replaced the directory: check the mount, then try again",
    errno.ENOENT: "check that nobody removes files in the run directory",
    errno.ENAMETOOLONG: "use a shorter path, or shorter keys at the top of the state",
    errno.ENOLCK: "the file system has no locks: mount it with them (NFS: without nolock), or use another one",
    errno.ENOSYS: "the file system lacks this call: mount it with it (Lustre's locks: -o flock), or use another one",
    errno.EOPNOTSUPP: "the file system lacks this call: use another one",
}


NO_LOCKS = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP))
"""With which file systems say that they have no locks."""


class FencedError(StorageError):
    """Another writer took the run, or moved this attempt away: nothing of it may be published."""


def refused(run: str, why: str, next: str) -> ConfigError:
    """Return the error for a directory that is no run directory and cannot become one."""
    return ConfigError(f"{run} cannot be used as a run directory", why=why, next=next, argument="run", path=run)


def path_of(fd: int, name: str = "") -> str:
    """Return the path of an open file or directory, joined with ``name``; for messages."""
    try:
        return os.path.join(os.readlink(f"/proc/self/fd/{fd}"), name) if name else os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # no /proc, or the descriptor is closed
        return name


def storage_error(what: str, exc: OSError, *, path: str, why: str = "", step: int | None = None) -> StorageError:
    """Return the error for an errno.

    Args:
        what: What did not happen, without a full stop.
        exc: What the kernel said.
        path: The file or directory that it is about.
        why: More than the errno's text, where something is known (figures).
        step: Of the save, where there is one.
    """
    code = exc.errno or errno.EIO
    text = f"{os.strerror(code)} ({errno.errorcode.get(code, code)})"
    return StorageError(
        f"{what}: {path}",
        why=f"{text}; {why}" if why else text,
        next=_NEXT.get(code, _ANYTHING),
        errno=code,
        path=path,
        step=step,
    )


@contextmanager
def storage_errors(what: str, path: str, *, fd: int | None = None) -> Iterator[None]:
    """Turn an ``OSError`` of the block into a ``StorageError``; our own errors pass, those that are OSErrors too.

    Args:
        what: What does not happen then.
        path: What it is about; with ``fd`` relative to that directory, or empty for that file itself.
        fd: Asked for its path when the error is made.
    """
    try:
        yield
    except CheckpointError:
        raise
    except OSError as exc:
        raise storage_error(what, exc, path=path if fd is None else path_of(fd, path)) from exc
