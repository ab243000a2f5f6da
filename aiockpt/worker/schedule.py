"""Which piece of a save's files is written next; pure.

A file is created, its blocks are written as they are staged, its header goes last, then it is made durable and closed.
A plain file is written in one go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from aiockpt.errors import ProtocolError
from aiockpt.format.image import BLOCK_NBYTES, block_count
from aiockpt.protocol.messages import FileImage

__all__ = ["MAX_OPEN_FILES", "Job", "JobKind", "Schedule"]

MAX_OPEN_FILES = 32
"""Created ahead of their bytes so that a full disk shows early, and not more, for the descriptors."""


class JobKind(Enum):
    """What one job does to its file."""

    CREATE = "create"
    BLOCK = "write"
    FINISH = "sync"
    PLAIN = "write whole"


class Job(NamedTuple):
    """One thing to do, by one thread."""

    kind: JobKind
    file: int
    block: int = 0


class _File:
    """How far one file is."""

    __slots__ = ("block", "blocks_left", "created", "image", "queued", "upto")

    def __init__(self, image: FileImage) -> None:
        self.image = image
        self.upto = 0
        self.created = False
        self.queued = False  # whether it stands in line for its blocks
        self.block = 0  # the next to be given out
        self.blocks_left = block_count(image.nbytes - image.data_start)  # not written yet

    @property
    def is_plain(self) -> bool:
        return self.image.data_start == 0

    @property
    def is_staged(self) -> bool:
        return self.upto >= self.image.nbytes

    def block_is_staged(self) -> bool:
        image = self.image
        start = image.data_start + self.block * BLOCK_NBYTES
        return start < image.nbytes and self.upto >= min(start + BLOCK_NBYTES, image.nbytes)


class Schedule:
    """Gives out jobs; never two for the same block, and a file's last one only when all others are done."""

    def __init__(self, images: Sequence[FileImage], *, max_open: int = MAX_OPEN_FILES) -> None:
        self._files = [_File(image) for image in images]
        self._max_open = max_open
        self._open = 0
        self._left = len(self._files)
        self._to_create = deque(i for i, file in enumerate(self._files) if not file.is_plain)
        self._prompt: deque[Job] = deque()
        self._with_blocks: deque[int] = deque()

    @property
    def is_complete(self) -> bool:
        """Whether every file is done."""
        return self._left == 0

    def staged(self, index: int, upto: int) -> None:
        """Take note that the first ``upto`` bytes of a file are final. Less than before changes nothing.

        Raises:
            ProtocolError: There is no such file, or it is not that long.
        """
        if not 0 <= index < len(self._files) or not 0 <= upto <= self._files[index].image.nbytes:
            raise ProtocolError(f"byte {upto} of file {index} was announced, which the plan does not have")
        self._staged(index, upto)

    def end(self) -> None:
        """Take note that everything is staged."""
        for index, file in enumerate(self._files):
            self._staged(index, file.image.nbytes)

    def take(self) -> Job | None:
        """Return the next job, or None while there is none."""
        if self._prompt:  # small, or frees a descriptor
            return self._prompt.popleft()
        if self._to_create and self._open < self._max_open:
            self._open += 1
            return Job(JobKind.CREATE, self._to_create.popleft())
        if not self._with_blocks:
            return None
        index = self._with_blocks[0]
        file = self._files[index]
        job = Job(JobKind.BLOCK, index, file.block)
        file.block += 1
        if not file.block_is_staged():
            file.queued = False
            self._with_blocks.popleft()
        return job

    def done(self, job: Job) -> None:
        """Take note that a job is done."""
        file = self._files[job.file]
        match job.kind:
            case JobKind.CREATE:
                file.created = True
                self._look(job.file)
            case JobKind.BLOCK:
                file.blocks_left -= 1
                self._look(job.file)
            case JobKind.FINISH:
                self._open -= 1
                self._left -= 1
            case JobKind.PLAIN:
                self._left -= 1

    def _staged(self, index: int, upto: int) -> None:
        file = self._files[index]
        # A plain file of no bytes is staged from the start, and is written when somebody says so.
        if upto < file.upto or (file.is_plain and file.created):
            return
        file.upto = upto
        if file.is_plain:
            if file.is_staged:
                file.created = True
                self._prompt.append(Job(JobKind.PLAIN, index))
        elif file.created:
            self._look(index)

    def _look(self, index: int) -> None:
        """Put a created file in line for what can be done with it now."""
        file = self._files[index]
        if file.block_is_staged() and not file.queued:
            file.queued = True
            self._with_blocks.append(index)
        elif file.blocks_left == 0 and file.is_staged and not file.queued:
            file.queued = True  # for good: nothing follows
            self._prompt.append(Job(JobKind.FINISH, index))
