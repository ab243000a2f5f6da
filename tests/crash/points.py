"""Who passes which fault point: what the suites leave out is named here, with the reason."""

from __future__ import annotations

from aiockpt.storage.faults import FaultPoint

__all__ = [
    "OF_HUB",
    "OF_RANKS",
    "OF_TRAINER",
    "OF_WORKER",
    "STARTING",
    "WITHOUT_ERRNO",
]

OF_WORKER = [point for point in FaultPoint if point.startswith("worker.")]
OF_TRAINER = [point for point in FaultPoint if point.startswith("trainer.")]

OF_RANKS = {
    FaultPoint.WORKER_WELCOMED,
    FaultPoint.WORKER_OPENED,
    FaultPoint.WORKER_CHECKING,
    FaultPoint.WORKER_WRITTEN_SAID,
    FaultPoint.WORKER_DETAILS_SAID,
    FaultPoint.WORKER_COMPARING,
    FaultPoint.WORKER_COMMITTING,
    FaultPoint.WORKER_ENDED,
    FaultPoint.WORKER_LOOKING,
    FaultPoint.WORKER_DROPPING,
    FaultPoint.TRAINER_ENLISTING,
    FaultPoint.TRAINER_VOTING,
}
"""A trainer that is alone has no hub."""

STARTING = {FaultPoint.WORKER_STARTED, FaultPoint.WORKER_ALLOCATING, FaultPoint.WORKER_RESERVED}
"""Passed before a save begins, once in a worker's life or at the first save."""

OF_HUB = {
    FaultPoint.WORKER_CHECKING: "plans are merged by the hub",
    FaultPoint.WORKER_COMPARING: "and so are details",
    FaultPoint.WORKER_FILES_DURABLE: "the commit is rank 0's",
    FaultPoint.WORKER_MANIFEST_WRITE: "the manifest is rank 0's",
    FaultPoint.WORKER_MANIFEST_DURABLE: "the manifest is rank 0's",
    FaultPoint.WORKER_BEFORE_RENAME: "the commit is rank 0's",
    FaultPoint.WORKER_OLD_ASIDE: "the commit is rank 0's",
    FaultPoint.WORKER_AFTER_RENAME: "the commit is rank 0's",
    FaultPoint.WORKER_RUN_SYNCED: "the commit is rank 0's",
    FaultPoint.WORKER_BEFORE_REPORT: "the commit is rank 0's; others pass WORKER_ENDED",
    FaultPoint.WORKER_PRUNE: "retention is rank 0's",
    FaultPoint.WORKER_REMOVE: "only rank 0's worker removes anything",
    FaultPoint.WORKER_LOOKING: "the hub looks what an earlier one has committed",
    FaultPoint.WORKER_DROPPING: "the hub has attempts removed",
}
"""Passed by rank 0's worker alone, and why."""

WITHOUT_ERRNO = {
    FaultPoint.WORKER_STARTED: "nothing is tried there",
    FaultPoint.WORKER_TORN: "it follows a write; see the tests of torn ones",
    FaultPoint.WORKER_WELCOMED: "a message",
    FaultPoint.WORKER_OPENED: "a message",
    FaultPoint.WORKER_CHECKING: "nothing but memory is worked on",
    FaultPoint.WORKER_WRITTEN_SAID: "a message",
    FaultPoint.WORKER_DETAILS_SAID: "a message",
    FaultPoint.WORKER_COMPARING: "nothing but memory is worked on",
    FaultPoint.WORKER_COMMITTING: "a message",
    FaultPoint.WORKER_ENDED: "a message",
}
"""Points of the worker at which the system is asked for nothing."""
