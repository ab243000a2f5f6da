"""A new file or directory that appears whole or not at all, and replaces nothing."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from aiockpt.errors import ConfigError
from aiockpt.format.names import RUN_RECORD_NAME
from aiockpt.storage.commit import remove_tree
from aiockpt.storage.direct import sync_dir
from aiockpt.storage.failures import storage_errors

__all__ = ["appears", "check_target"]

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NO_LINKS = frozenset((errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK))
"""With which file systems say that they have no hard links."""


def check_target(target: str) -> str:
    """Return the absolute path of what is to be made.

    Raises:
        ConfigError: It exists, the directory that it would be in does not, or that belongs to a run.
    """
    path = os.path.abspath(target)
    if os.path.lexists(path):
        raise _exists(path)
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        raise ConfigError(
            f"{path} was not written",
            why=f"{parent} is no directory",
            next="make it first, or choose another place",
            argument="to",
            path=path,
        )
    above = os.path.realpath(parent)
    while above != os.path.dirname(above):
        if os.path.lexists(f"{above}/{RUN_RECORD_NAME}"):
            raise ConfigError(
                f"{path} was not written",
                why=f"{above} is a run, and holds nothing but checkpoints",
                next="choose a place outside of it",
                argument="to",
                path=path,
            )
        above = os.path.dirname(above)
    return path


@contextmanager
def appears(target: str, *, is_directory: bool) -> Iterator[int]:
    """Make a hidden directory beside ``target``; what the block leaves there becomes ``target``, durably.

    Args:
        target: From ``check_target``.
        is_directory: Whether it is to be the directory itself, or the file of its name in it.

    Yields:
        The descriptor of the hidden directory, which the block writes into, durably. Whatever ends the block, nothing
        of it is left.

    Raises:
        ConfigError: Something has appeared there meanwhile.
        StorageError: The operating system refused something.
    """
    parent, name = os.path.split(target)
    hidden = f".aiockpt-export-{secrets.token_hex(8)}"
    with storage_errors("an export was not written", parent):
        parent_fd = os.open(parent, _OPEN_DIRECTORY)
        try:
            try:
                os.mkdir(hidden, dir_fd=parent_fd)  # inside: an interrupt may come right behind it
                fd = os.open(hidden, _OPEN_DIRECTORY, dir_fd=parent_fd)
                try:
                    yield fd
                    sync_dir(fd)
                finally:
                    os.close(fd)
                # point of no return
                if is_directory:
                    _move_directory(parent_fd, hidden, name, target)
                else:
                    _move_file(parent_fd, hidden, name, target)
                sync_dir(parent_fd)
            finally:
                remove_tree(parent_fd, hidden)
        finally:
            os.close(parent_fd)


def _move_directory(parent_fd: int, hidden: str, name: str, target: str) -> None:
    if os.access(name, os.F_OK, dir_fd=parent_fd, follow_symlinks=False):
        raise _exists(target)  # a rename would replace an empty directory
    try:
        os.rename(hidden, name, src_dir_fd=parent_fd, dst_dir_fd=parent_fd)
    except OSError as exc:
        if exc.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise _exists(target) from exc
        raise


def _move_file(parent_fd: int, hidden: str, name: str, target: str) -> None:
    file = f"{hidden}/{name}"
    try:
        os.link(file, name, src_dir_fd=parent_fd, dst_dir_fd=parent_fd)  # a rename would replace what is there
    except FileExistsError as exc:
        raise _exists(target) from exc
    except OSError as exc:
        if exc.errno not in _NO_LINKS:
            raise
        if os.access(name, os.F_OK, dir_fd=parent_fd, follow_symlinks=False):
            raise _exists(target) from exc
        os.rename(file, name, src_dir_fd=parent_fd, dst_dir_fd=parent_fd)


def _exists(path: str) -> ConfigError:
    return ConfigError(
        f"{path} was not written",
        why="it exists already",
        next="choose another name, or remove it first",
        argument="to",
        path=path,
    )
