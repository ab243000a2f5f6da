"""A file that another program wrote."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from types import TracebackType
from typing import Self

import xxhash

from aiockpt.errors import ConfigError
from aiockpt.format.image import BLOCK_NBYTES
from aiockpt.storage.failures import storage_errors

__all__ = ["ForeignFile", "refused"]


def refused(path: str, why: str, next: str = "") -> ConfigError:
    """Return the error for what cannot be imported."""
    return ConfigError(f"{path} was not imported", why=why, next=next, argument="source", path=path)


class ForeignFile:
    """An open file whose bytes nobody vouches for; a context manager.

    Args:
        path: Absolute; links are followed, as the caches of model hubs are made of them.

    Raises:
        ConfigError: It is missing, or no regular file.
        StorageError: It cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with storage_errors("a file was not opened", path):
            try:
                self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hang us
            except (FileNotFoundError, NotADirectoryError) as exc:
                raise refused(path, "it does not exist", "check the path") from exc
            status = os.fstat(self.fd)
        self.nbytes = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise refused(path, "it is no regular file", "give a file, or a directory of safetensors files")

    def read(self, nbytes: int, offset: int = 0) -> bytes:
        """Return ``nbytes`` from ``offset`` on, fewer at the end of the file.

        Raises:
            StorageError: It cannot be read.
        """
        parts: list[bytes] = []
        with storage_errors("a file was not read", self.path):
            while nbytes and (part := os.pread(self.fd, nbytes, offset)):
                parts.append(part)
                nbytes -= len(part)
                offset += len(part)
        return b"".join(parts)

    def read_through(
        self, on_progress: Callable[[int], None], *, start: int = 0, block_nbytes: int = 0, sums: tuple[int, ...] = ()
    ) -> None:
        """Read everything from ``start`` on, and compare it with checksums where there are some.

        What is mapped afterwards comes from the page cache, as far as it is large enough; a disk that cannot be read
        is an error here, and a signal there.

        Args:
            on_progress: Called with the bytes that were read since the last call.
            start: First byte.
            block_nbytes: What one checksum is of; 0 without any.
            sums: xxh3-64 of each block.

        Raises:
            ConfigError: The bytes are not those that the checksums are of.
            StorageError: They cannot be read.
        """
        for index, offset in enumerate(range(start, self.nbytes, block_nbytes or BLOCK_NBYTES)):
            data = self.read(block_nbytes or BLOCK_NBYTES, offset)
            if sums and xxhash.xxh3_64_intdigest(data) != sums[index]:
                raise refused(
                    self.path,
                    f"the checksum of the {len(data)} bytes from {offset} on is not the one in its header: it is "
                    "damaged, or was changed by a program that left the header's text as it was",
                    "take another copy, or have safetensors load it and save it anew",
                )
            on_progress(len(data))

    def close(self) -> None:
        """Close it."""
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
