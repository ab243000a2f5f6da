"""Writes the files of one save while they are being staged."""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence

import anyio
import anyio.to_thread
import xxhash

from aiockpt.format.image import BLOCK_NBYTES, block_count, fill_sums, round_up
from aiockpt.format.manifest import FileRecord
from aiockpt.protocol.messages import FileImage
from aiockpt.storage.direct import FileWriter, write_small
from aiockpt.storage.faults import FaultPoint, Faults
from aiockpt.worker.activity import Activity
from aiockpt.worker.schedule import Job, JobKind, Schedule

__all__ = ["DEFAULT_WRITERS", "FilesWriter"]

DEFAULT_WRITERS = 4
"""Threads that hash and write. Measured, 1 GiB to ext4 with two cores: 1.8 GB/s with one thread, 2.7 with two, 2.9 with
four, 3.0 with eight, where bare O_DIRECT writes reach 2.5 to 2.6. A cancel waits for one block of each."""


class FilesWriter:
    """Brings every file of a save from the arena to the disk; the loop's side and the threads' side.

    The arena is read by threads of ``run`` only: when that has returned or raised, none reads it any more.
    """

    def __init__(
        self,
        images: Sequence[FileImage],
        arena: memoryview,
        *,
        activity: Activity,
        faults: Faults,
        limiter: anyio.CapacityLimiter,
    ) -> None:
        self._images = images
        self._arena = arena
        self._activity = activity
        self._faults = faults
        self._limiter = limiter
        self._schedule = Schedule(images)
        self._more = anyio.Event()
        self._open: dict[int, FileWriter] = {}
        self._sums = [[0] * block_count(image.nbytes - image.data_start) for image in images]
        self._records: list[FileRecord | None] = [None] * len(images)
        self._began_at = self._written_at = self._durable_at = time.monotonic()
        self.written = 0
        """Bytes handed to the operating system."""
        self.buffered = False
        """Whether direct I/O was refused for a file."""

    @property
    def timings(self) -> dict[str, float]:
        """Seconds to the end of the last block's write, from there until all files were durable, and the flag."""
        return {
            "write": self._written_at - self._began_at,
            "sync": self._durable_at - self._written_at,
            "buffered": float(self.buffered),
        }

    @property
    def records(self) -> list[FileRecord]:
        """What the manifest says of the files; complete when ``run`` has returned."""
        return [record for record in self._records if record is not None]

    def staged(self, file: int, upto: int) -> None:
        """Take note that the first ``upto`` bytes of a file's image are final.

        Raises:
            ProtocolError: There is no such file, or it is not that long.
        """
        self._schedule.staged(file, upto)
        self._wake()

    def end(self) -> None:
        """Take note that everything is staged."""
        self._schedule.end()
        self._wake()

    async def run(self, attempt_fd: int) -> None:
        """Write until all files are durable.

        Args:
            attempt_fd: Directory that the files' paths are relative to; its folders stand.

        Raises:
            StorageError: Of the file that failed first; the others are left as they are.

        Cancellation: what a thread has begun ends first, at most a block each.
        """
        self._began_at = time.monotonic()
        try:
            async with anyio.create_task_group() as tasks:
                for _ in range(int(self._limiter.total_tokens)):
                    tasks.start_soon(self._work, attempt_fd)
        finally:
            for writer in self._open.values():
                writer.abort()
            self._open.clear()
        self._durable_at = time.monotonic()

    def _wake(self) -> None:
        self._more.set()
        self._more = anyio.Event()

    async def _work(self, attempt_fd: int) -> None:
        while not self._schedule.is_complete:
            job = self._schedule.take()
            if job is None:
                await self._more.wait()
                continue
            nbytes = await anyio.to_thread.run_sync(self._do, job, attempt_fd, limiter=self._limiter)
            self.written += nbytes
            if job.kind in (JobKind.BLOCK, JobKind.PLAIN):
                self._written_at = time.monotonic()
            self._schedule.done(job)
            self._wake()

    # ---- in a thread of its own

    def _do(self, job: Job, attempt_fd: int) -> int:
        """Do one job and return how many bytes it wrote."""
        image = self._images[job.file]
        with self._activity.operation(f"{job.kind.value} {image.path}"):
            match job.kind:
                case JobKind.CREATE:
                    return self._create(job.file, image, attempt_fd)
                case JobKind.BLOCK:
                    return self._write_block(job.file, image, job.block)
                case JobKind.FINISH:
                    return self._finish(job.file, image)
                case JobKind.PLAIN:
                    return self._write_plain(job.file, image, attempt_fd)

    def _create(self, file: int, image: FileImage, attempt_fd: int) -> int:
        self._open[file] = FileWriter.create(attempt_fd, image.path, image.nbytes, faults=self._faults)
        return 0

    def _write_block(self, file: int, image: FileImage, block: int) -> int:
        writer = self._open[file]
        start = image.data_start + block * BLOCK_NBYTES
        stop = min(start + BLOCK_NBYTES, image.nbytes)
        with self._arena[image.offset + start : image.offset + stop] as content:
            self._sums[file][block] = xxhash.xxh3_64_intdigest(content)
        # Direct I/O needs whole sectors; what stands behind the file's end in the arena is cut off by finish().
        with self._arena[image.offset + start : image.offset + round_up(stop)] as padded:
            writer.write(padded, start)
        return stop - start

    def _finish(self, file: int, image: FileImage) -> int:
        writer = self._open[file]
        with self._arena[image.offset : image.offset + image.data_start] as blank:
            header = bytearray(blank)
        fill_sums(header, image.sums_at, self._sums[file])
        with mmap.mmap(-1, image.data_start) as private:  # direct I/O needs aligned memory
            private[:] = header
            with memoryview(private) as view:
                writer.write(view, 0)
        self.buffered |= writer.buffered
        writer.finish()
        del self._open[file]
        self._records[file] = _record(image, header)
        return image.data_start

    def _write_plain(self, file: int, image: FileImage, attempt_fd: int) -> int:
        content = bytes(self._arena[image.offset : image.offset + image.nbytes])
        write_small(attempt_fd, image.path, content, point=FaultPoint.WORKER_BLOCK_WRITE, faults=self._faults)
        self._records[file] = _record(image, content)
        return image.nbytes


def _record(image: FileImage, summed: bytes | bytearray) -> FileRecord:
    return FileRecord(
        path=image.path,
        nbytes=image.nbytes,
        data_start=image.data_start,
        sum=xxhash.xxh3_128_hexdigest(summed),
    )
