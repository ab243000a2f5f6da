"""One try of one save in the run directory: made, published or removed."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from datetime import UTC, datetime

from aiockpt import __version__
from aiockpt.errors import StorageError
from aiockpt.format.manifest import FileRecord, Head, encode_manifest
from aiockpt.format.names import attempt_name
from aiockpt.protocol.messages import BeginSave, EndStaging
from aiockpt.storage.commit import join_attempt, make_attempt, publish, remove_tree, write_manifest
from aiockpt.storage.failures import FencedError, storage_errors
from aiockpt.storage.faults import FaultPoint, Faults
from aiockpt.storage.run_directory import Committed, find_committed
from aiockpt.worker.activity import Activity
from aiockpt.worker.run import Run

__all__ = ["Attempt"]


class Attempt:
    """Every method blocks on the disk; they are called from one thread at a time."""

    def __init__(self, run: Run, begin: BeginSave, *, activity: Activity, faults: Faults) -> None:
        self.name = attempt_name(begin.step, begin.save_id, begin.attempt)
        self._run = run
        self._begin = begin
        self._activity = activity
        self._faults = faults
        self._folders = sorted({image.path.partition("/")[0] for image in begin.files if "/" in image.path})
        self._fd = -1
        self._is_open = False

    @property
    def path(self) -> str:
        """Absolute path of its directory."""
        return f"{self._run.path}/{self.name}"

    def is_published(self) -> bool:
        """Tell whether a former try of this save was published already."""
        begin = self._begin
        with self._activity.operation(f"look for step {begin.step}"):
            standing = find_committed(self._run.fd, self._run.path, begin.step)
        return standing is not None and standing.save_id == begin.save_id

    def make(self) -> int:
        """Make the directories and return the descriptor of the outer one, which stays this object's.

        Raises:
            StorageError: Not all of them stand.
        """
        with self._activity.operation(f"make {self.name}"):
            self._run.open_attempt()
            self._is_open = True
            self._fd = make_attempt(self._run.fd, self.name, self._folders, faults=self._faults)
        return self._fd

    def join(self) -> int:
        """Open the directories that the worker of rank 0 made, as ``make``.

        Raises:
            StorageError: They are not there, or not all of them can be used.
        """
        with self._activity.operation(f"open {self.name}"):
            self._run.open_attempt()
            self._is_open = True
            self._fd = join_attempt(self._run.fd, self.name, self._folders, faults=self._faults)
        return self._fd

    def write_manifest(self, end: EndStaging, records: Sequence[FileRecord], plan: bytes) -> None:
        """Write the manifest, last, and make it and all directories durable.

        Raises:
            StorageError: The attempt may not be published.
        """
        with storage_errors("a manifest was not begun", self.path):
            self._faults.at(FaultPoint.WORKER_FILES_DURABLE, self.path)
        begin = self._begin
        head = Head(
            step=begin.step,
            term=self._run.term,
            ordinal=begin.ordinal,
            save_id=begin.save_id,
            world_size=1,
            nbytes=sum(image.nbytes for image in begin.files if image.data_start),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            package=__version__,
        )
        data = encode_manifest(head, list(records), values=end.values, metadata=end.metadata, plan=plan)
        with self._activity.operation(f"write the manifest of {self.name}"):
            write_manifest(self._fd, data, self._folders, faults=self._faults)

    def publish(self) -> tuple[Committed, list[str]]:
        """Make the checkpoint visible: the point of no return.

        Returns:
            What stands now, and names in the run that may be removed.

        Raises:
            FencedError: Another job has the run, or moved the attempt away.
            StepExistsError: The step stands, and may not be replaced.
            StorageError: Nothing was published.
            CommitUnknownError: It was published, and may not be durable.
        """
        begin = self._begin
        with self._activity.operation(f"publish {self.name}"):
            published = publish(
                self._run.fd,
                self.name,
                run=self._run.path,
                step=begin.step,
                save_id=begin.save_id,
                term=self._run.term,
                overwrite=begin.overwrite,
                faults=self._faults,
            )
        self._close()
        with contextlib.suppress(OSError):  # nothing is tried here that an errno could be about
            self._faults.at(FaultPoint.WORKER_BEFORE_REPORT, self.name)
        return published

    def remove(self) -> None:
        """Remove what stands of it.

        Raises:
            StorageError: Some of it stands; the next job on the run reaps it.
        """
        try:
            with self._activity.operation(f"remove {self.name}"):
                remove_tree(self._run.fd, self.name, faults=self._faults)
        finally:
            self._close()

    def leave(self) -> None:
        """Let go of it as it is."""
        self._close()

    def explain(self, exc: StorageError) -> StorageError:
        """Return what an error of this attempt means: ENOENT is a run that is gone, or a fence."""
        if exc.errno == errno.ENOENT and self._run.is_gone:
            return StorageError(
                f"step {self._begin.step} was not written: {self._run.path}",
                why="the run directory was removed while it was in use",
                next="check that nobody cleans up below it, and open the run again",
                errno=errno.ENOENT,
                path=self._run.path,
                step=self._begin.step,
            )
        if exc.errno == errno.ENOENT and not self._run.holds(self.name):
            return FencedError(
                f"step {self._begin.step} was not written",
                why=f"its attempt {self.name} was moved away",
                next="look for another job on this run",
                errno=errno.ENOENT,
                path=self.path,
                step=self._begin.step,
            )
        if isinstance(exc, FencedError) or exc.path is None or os.path.isabs(exc.path):
            return exc
        exc.path = f"{self.path}/{exc.path}"
        return exc

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if self._is_open:
            self._is_open = False
            self._run.close_attempt()
