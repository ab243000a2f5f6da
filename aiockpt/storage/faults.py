"""The seam where tests break things: every point is named here, and nothing happens at them by default.

The crash suite walks ``FaultPoint``, so a new point is tested by existing. ``aiockpt.testing`` arms the layer.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = ["NO_FAULTS", "FaultPoint", "Faults"]


class FaultPoint(StrEnum):
    """Where a process can be killed, stopped or delayed; and, where something is tried, told of an error."""

    WORKER_STARTED = "worker.started"
    WORKER_ALLOCATING = "worker.allocating"
    WORKER_RESERVED = "worker.reserved"
    WORKER_ATTEMPT_MADE = "worker.attempt_made"
    """The attempt's directories stand, and are empty."""
    WORKER_OPEN_DIRECT = "worker.open_direct"
    """A file is about to be switched to direct I/O; EINVAL is a file system that has none."""
    WORKER_PREALLOCATE = "worker.preallocate"
    WORKER_BLOCK_WRITE = "worker.block_write"
    WORKER_TORN = "worker.torn"
    """Behind a write that ``Faults.clip`` made short."""
    WORKER_FILE_SYNC = "worker.file_sync"
    WORKER_FILES_DURABLE = "worker.files_durable"
    WORKER_MANIFEST_WRITE = "worker.manifest_write"
    WORKER_MANIFEST_DURABLE = "worker.manifest_durable"
    WORKER_BEFORE_RENAME = "worker.before_rename"
    WORKER_OLD_ASIDE = "worker.old_aside"
    """A replaced checkpoint is aside, its successor not in its place yet."""
    WORKER_AFTER_RENAME = "worker.after_rename"
    WORKER_RUN_SYNCED = "worker.run_synced"
    WORKER_BEFORE_REPORT = "worker.before_report"
    WORKER_PRUNE = "worker.prune"
    """A checkpoint is about to be renamed out of the run."""
    WORKER_REMOVE = "worker.remove"
    """Something on its way out is about to be deleted."""
    WORKER_WELCOMED = "worker.welcomed"
    """Of several ranks: the hub has taken this one in, and nobody was told."""
    WORKER_OPENED = "worker.opened"
    """Of several ranks: this one has heard under which id it writes; neither its trainer nor the disk knows."""
    WORKER_CHECKING = "worker.checking"
    """The hub: all ranks have come, and their plans are about to be compared."""
    WORKER_WRITTEN_SAID = "worker.written_said"
    """Of several ranks: the hub was told that this one's files are durable."""
    WORKER_DETAILS_SAID = "worker.details_said"
    """Of several ranks: the hub was told what this one has sums of; only ranks that are asked come here."""
    WORKER_COMPARING = "worker.comparing"
    """The hub: all ranks have written, and their details are about to be compared."""
    WORKER_COMMITTING = "worker.committing"
    """Of several ranks: this one has heard that the hub commits; its trainer has not."""
    WORKER_ENDED = "worker.ended"
    """Of several ranks: this one has heard the outcome; its trainer has not."""
    WORKER_LOOKING = "worker.looking"
    """A later hub: about to look whether a checkpoint stands that an earlier one had opened."""
    WORKER_DROPPING = "worker.dropping"
    """The hub: a save has failed on all ranks, and its attempt is about to be moved away."""
    TRAINER_BEGIN_SENT = "trainer.begin_sent"
    TRAINER_COPIED = "trainer.copied"
    TRAINER_STAGED_SENT = "trainer.staged_sent"
    TRAINER_BEFORE_FENCE = "trainer.before_fence"
    TRAINER_RESTORING = "trainer.restoring"
    TRAINER_READ = "trainer.read"
    """Before each read of a checkpoint's file."""
    TRAINER_TAKING_RUN = "trainer.taking_run"
    """The lock is held, the term is not claimed yet."""
    TRAINER_ENLISTING = "trainer.enlisting"
    """Of several ranks: the worker is about to be told where the others are."""
    TRAINER_VOTING = "trainer.voting"
    """Of several ranks: before each vote of a restore; the path is the vote's name."""


class Faults:
    """The layer that does nothing."""

    def at(self, point: FaultPoint, path: str = "") -> None:
        """Pass a point; an armed layer may raise ``OSError``, wait, stop or kill this process here."""

    def clip(self, path: str, offset: int, nbytes: int) -> int:
        """Return how many of ``nbytes`` the next write may take; fewer is a torn write, ``WORKER_TORN`` follows it."""
        return nbytes


NO_FAULTS = Faults()
