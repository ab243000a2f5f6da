"""Reading a whole checkpoint for its checksums alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from aiockpt.errors import CheckpointError
from aiockpt.storage.readers import AlignedBuffer, FileReader, OpenCheckpoint, open_checkpoint

__all__ = ["verify_checkpoint"]


def verify_checkpoint(path: str, *, on_progress: Callable[[int], None] | None = None, threads: int = 4) -> int:
    """Read every byte of a checkpoint and compare all checksums.

    Args:
        path: Of one step's directory.
        on_progress: Called with the bytes read since the last call, from one thread at a time.
        threads: That read at once.

    Returns:
        Bytes read, the manifest aside.

    Raises:
        CheckpointCorruptError: The first bad place, in the order of the manifest.
        CheckpointError: As ``open_checkpoint``.
    """
    with open_checkpoint(path) as checkpoint:
        run = _Run(checkpoint, on_progress)
        with ThreadPoolExecutor(threads, thread_name_prefix="aiockpt-verify") as pool:
            for future in [pool.submit(run.work) for _ in range(threads)]:
                future.result()
        if run.failures:
            raise run.failures[min(run.failures)]
        return run.nbytes


class _Run:
    def __init__(self, checkpoint: OpenCheckpoint, on_progress: Callable[[int], None] | None) -> None:
        self.nbytes = 0
        self.failures: dict[tuple[int, int], CheckpointError] = {}
        self._checkpoint = checkpoint
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._places = self._walk()

    def _walk(self) -> Iterator[tuple[int, int, FileReader]]:
        """Yield (file, block): block -1 is the header, or a plain file."""
        for index, record in enumerate(self._checkpoint.manifest.files):
            reader = self._checkpoint.file(index)
            yield index, -1, reader
            if record.data_start:
                for block in range(reader.block_count):
                    yield index, block, reader

    def work(self) -> None:
        buffer = AlignedBuffer(0)
        while True:
            with self._lock:
                place = None if self.failures else next(self._places, None)
            if place is None:
                return
            index, block, reader = place
            try:
                if block < 0:
                    count = len(reader.content()) if not reader.record.data_start else reader.header().data_start
                else:
                    start, stop = reader.block_range(block)
                    count = stop - start
                    if buffer.nbytes < count:
                        buffer = AlignedBuffer(count)
                    reader.read_block(block, buffer)
            except CheckpointError as exc:
                with self._lock:
                    self.failures[index, block] = exc
                return
            with self._lock:
                self.nbytes += count
                if self._on_progress is not None:
                    self._on_progress(count)
