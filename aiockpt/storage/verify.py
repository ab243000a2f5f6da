"""Reading a whole checkpoint for its checksums alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from aiockpt.errors import CheckpointError
from aiockpt.format.image import BLOCK_NBYTES
from aiockpt.storage.faults import NO_FAULTS, Faults
from aiockpt.storage.readers import AlignedBuffer, FileReader, open_checkpoint

__all__ = ["verify_checkpoint"]


def verify_checkpoint(
    path: str, *, on_progress: Callable[[int], None] | None = None, threads: int = 4, faults: Faults = NO_FAULTS
) -> int:
    """Read every byte of a checkpoint and compare all checksums.

    Args:
        path: Of one step's directory.
        on_progress: Called with the bytes read since the last call, from one thread at a time, not always the same.
        threads: That read at once; each has a buffer of one block.
        faults: Fault layer.

    Returns:
        Bytes read, the manifest aside.

    Raises:
        CheckpointCorruptError: The first bad place, in the order of the manifest.
        CheckpointError: As ``open_checkpoint``.
    """
    with (
        open_checkpoint(path, faults=faults) as checkpoint,
        ThreadPoolExecutor(threads, thread_name_prefix="aiockpt-verify") as pool,
    ):
        for index in range(len(checkpoint.manifest.files)):
            work = _FileWork(checkpoint.file(index), on_progress)
            try:
                for future in [pool.submit(work.run) for _ in range(min(threads, work.count))]:
                    future.result()
            finally:
                work.stopped = True  # Ctrl-C ends the threads after their block
            if work.failures:
                raise work.failures[min(work.failures)]
            checkpoint.close_file(index)
        return sum(record.nbytes for record in checkpoint.manifest.files)


class _FileWork:
    """The blocks of one file, shared by the threads that take them in turn."""

    def __init__(self, reader: FileReader, on_progress: Callable[[int], None] | None) -> None:
        self.count = 1
        self.stopped = False
        self.failures: dict[int, CheckpointError] = {}
        self._reader = reader
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._next = 0
        if reader.record.data_start:
            reader.header()
            self.count = reader.block_count
            self._advance(reader.record.data_start)

    def run(self) -> None:
        reader = self._reader
        buffer = AlignedBuffer(min(reader.nbytes, reader.block_nbytes if reader.record.data_start else BLOCK_NBYTES))
        while (index := self._take()) is not None:
            try:
                self._check(index, buffer)
            except CheckpointError as exc:
                with self._lock:
                    self.failures[index] = exc
                    self.stopped = True

    def _take(self) -> int | None:
        with self._lock:
            if self.stopped or self._next == self.count:
                return None
            self._next += 1
            return self._next - 1

    def _check(self, index: int, buffer: AlignedBuffer) -> None:
        if self._reader.record.data_start:
            self._advance(len(self._reader.read_block(index, buffer)))
        else:
            self._reader.check_content(buffer)
            self._advance(self._reader.nbytes)

    def _advance(self, nbytes: int) -> None:
        if self._on_progress is not None:
            with self._lock:
                self._on_progress(nbytes)
