"""An errno as a ``StorageError``: what was tried, why it failed, what to do now."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from aiockpt.errors import CheckpointError, StorageError

__all__ = ["FencedError", "storage_error", "storage_errors"]

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
    errno.ENOTDIR: "give the path of a directory",
    errno.ENAMETOOLONG: "use a shorter path, or shorter keys at the top of the state",
    errno.ENOLCK: "the file system has no locks: mount it with them (NFS: without nolock), or use another one",
}


class FencedError(StorageError):
    """Another writer took the run, or moved this attempt away: nothing of it may be published."""


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
    text = f"[{errno.errorcode.get(code, code)}] {os.strerror(code)}"
    return StorageError(
        f"{what}: {path}",
        why=f"{text}; {why}" if why else text,
        next=_NEXT.get(code, "look at the path and its file system, then try again"),
        errno=code,
        path=path,
        step=step,
    )


@contextmanager
def storage_errors(what: str, path: str) -> Iterator[None]:
    """Turn an ``OSError`` of the block into a ``StorageError``; our own errors pass, those that are OSErrors too."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as exc:
        raise storage_error(what, exc, path=path) from exc
