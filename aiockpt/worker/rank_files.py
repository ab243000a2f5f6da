"""The files of one rank: those that are its own share, and those of undeclared tensors, which may be nobody's to write.

What nobody declared is staged by every rank, compared by checksums, and written by the lowest rank that has it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import anyio
import anyio.to_thread
import msgspec
import xxhash

from aiockpt.errors import StorageError
from aiockpt.format.image import parse_header
from aiockpt.format.manifest import FileRecord
from aiockpt.protocol.messages import BeginSave, FileImage
from aiockpt.worker.attempt import Attempt
from aiockpt.worker.save import Surroundings
from aiockpt.worker.writer import FilesWriter

__all__ = ["RankFiles"]


class RankFiles:
    """Writes one attempt after the other; what was staged stays staged.

    Args:
        begin: With a ``call``.
        arena: Read by threads of ``write``, ``sum_up`` and ``write_extra`` only.
        surroundings: Of the save.
    """

    def __init__(self, begin: BeginSave, arena: memoryview, surroundings: Surroundings) -> None:
        assert begin.call is not None, "the caller has looked"
        self._images = begin.files
        self._arena = arena
        self._s = surroundings
        extra = frozenset(begin.call.extra_files)
        self._extra = sorted(extra)
        self._keys = dict(zip(begin.call.extra_files, begin.call.extra_keys, strict=False))
        self._main = [number for number in range(len(begin.files)) if number not in extra]
        self._position = {number: at for at, number in enumerate(self._main)}
        self._upto: dict[int, int] = {}
        self._is_ended = False
        self._attempt: Attempt | None = None
        self._attempt_fd = -1
        self._writer = self._new_writer(self._main)
        self._records: dict[int, FileRecord] = {}
        self.sums: dict[str, str] = {}
        """By dotted name, once ``sum_up`` has returned: xxh3-64 of each undeclared tensor."""

    @property
    def written(self) -> int:
        """Bytes handed to the operating system in this attempt."""
        return self._writer.written

    @property
    def timings(self) -> dict[str, float]:
        """As ``FilesWriter.timings``, of this rank's share."""
        return self._writer.timings

    @property
    def tensors_sum(self) -> str:
        """xxh3-128 of all undeclared tensors."""
        return _sum_of(self.sums)

    @staticmethod
    def values_sum(values: bytes) -> str:
        """xxh3-128 of encoded values."""
        return xxhash.xxh3_128_hexdigest(values)

    @staticmethod
    def probes_sum(sums: Mapping[str, str]) -> str:
        """xxh3-128 of the samples of one group."""
        return _sum_of(sums)

    def staged(self, file: int, upto: int) -> None:
        """Take note that the first ``upto`` bytes of a file's image are final.

        Raises:
            ProtocolError: There is no such file, or it is not that long.
        """
        if file in self._position or file >= len(self._images):
            self._writer.staged(self._position.get(file, file), upto)
        self._upto[file] = upto

    def end(self) -> None:
        """Take note that everything is staged."""
        self._is_ended = True
        self._writer.end()

    async def write(self, attempt: Attempt) -> None:
        """Write this rank's share into an attempt, while it is being staged.

        Raises:
            StorageError: Of the file that failed first.

        Cancellation: what a thread has begun ends first, at most a block each.
        """
        await self.leave()
        self._attempt = attempt
        self._records = {}
        self._writer = self._new_writer(self._main)
        self._attempt_fd = await self._s.in_thread(attempt.join)
        await self._run(self._writer, self._main)

    async def sum_up(self) -> None:
        """Compute the checksums of undeclared tensors; all is staged. Does not yield where there are none."""
        if self._extra and not self.sums:
            for number in self._extra:
                self.sums |= await anyio.to_thread.run_sync(
                    functools.partial(self._sums_of, self._images[number], self._keys.get(number, "")),
                    limiter=self._s.writers,
                )

    async def write_extra(self, folders: list[str]) -> None:
        """Write the undeclared tensors of these folders."""
        wanted = [number for number in self._extra if self._images[number].path.partition("/")[0] in folders]
        if wanted:
            writer = self._new_writer(wanted)
            writer.end()
            await self._run(writer, wanted)

    @property
    def records(self) -> list[FileRecord]:
        """What was written, in the order of the plan."""
        return [self._records[number] for number in sorted(self._records)]

    def explain(self, exc: StorageError) -> StorageError:
        """See ``Attempt.explain``. Blocks."""
        return exc if self._attempt is None else self._attempt.explain(exc)

    async def leave(self) -> None:
        """Let go of the attempt that was written last; whoever decides on it is the hub."""
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            await self._s.in_thread(attempt.leave)

    async def _run(self, writer: FilesWriter, numbers: list[int]) -> None:
        await writer.run(self._attempt_fd)
        self._records |= zip(numbers, writer.records, strict=True)

    def _new_writer(self, numbers: list[int]) -> FilesWriter:
        writer = FilesWriter(
            [self._images[number] for number in numbers],
            self._arena,
            activity=self._s.activity,
            faults=self._s.faults,
            limiter=self._s.writers,
        )
        for position, number in enumerate(numbers):
            if number in self._upto:
                writer.staged(position, self._upto[number])
        if self._is_ended:
            writer.end()
        return writer

    def _sums_of(self, image: FileImage, key: str) -> dict[str, str]:
        with self._s.activity.operation(f"sum up {image.path}"):
            with self._arena[image.offset : image.offset + image.data_start] as view:
                header = parse_header(bytes(view), file=image.path, file_nbytes=image.nbytes)
            found = {}
            for name, stored in header.tensors.items():
                with self._arena[image.offset + stored.start : image.offset + stored.stop] as content:
                    found[f"{key}.{name}" if key else name] = xxhash.xxh3_64_hexdigest(content)
            return found


def _sum_of(sums: Mapping[str, str]) -> str:
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(sums, order="sorted"))
