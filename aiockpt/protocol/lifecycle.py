"""The life of a save as one table that both ends run.

Writing is no state: it begins with the first staged block. ``WRITTEN`` means that every file is durable, ``COMMITTING``
that the manifest is on its way: from there nothing can cancel, and an outcome that nobody saw is ``UNKNOWN``.
"""

from __future__ import annotations

from enum import Enum

__all__ = ["FINAL", "TRANSITIONS", "SaveEvent", "SaveState", "advance"]


class SaveState(Enum):
    """Where a save is."""

    PLANNED = "planned"
    STAGING = "staging"
    STAGED = "staged"
    WRITTEN = "written"
    COMMITTING = "committing"
    COMMITTED = "committed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"
    UNKNOWN = "unknown"


class SaveEvent(Enum):
    """What moves a save on."""

    BEGIN = "begin"
    STAGING_DONE = "staging_done"
    FILES_DURABLE = "files_durable"
    COMMIT_BEGUN = "commit_begun"
    COMMIT_DONE = "commit_done"
    WORKER_DIED = "worker_died"
    FAIL = "fail"
    CANCEL = "cancel"
    SKIP = "skip"
    LOSE = "lose"


S, E = SaveState, SaveEvent

TRANSITIONS: dict[SaveState, dict[SaveEvent, SaveState]] = {
    S.PLANNED: {
        E.BEGIN: S.STAGING,
        E.SKIP: S.SKIPPED,
        E.FAIL: S.FAILED,
        E.CANCEL: S.CANCELLED,
        E.WORKER_DIED: S.PLANNED,
    },
    # A worker's death leaves STAGING: the trainer goes on copying, the next worker is told what is staged.
    # With several ranks a copy begins before all have decided, and may turn out to be skipped.
    S.STAGING: {
        E.STAGING_DONE: S.STAGED,
        E.SKIP: S.SKIPPED,
        E.FAIL: S.FAILED,
        E.CANCEL: S.CANCELLED,
        E.WORKER_DIED: S.STAGING,
    },
    S.STAGED: {
        E.FILES_DURABLE: S.WRITTEN,
        E.SKIP: S.SKIPPED,
        E.FAIL: S.FAILED,
        E.CANCEL: S.CANCELLED,
        E.WORKER_DIED: S.STAGED,
    },
    # After a look whether step-N has the id: if it has, COMMIT_DONE comes first.
    S.WRITTEN: {E.COMMIT_BEGUN: S.COMMITTING, E.FAIL: S.FAILED, E.CANCEL: S.CANCELLED, E.WORKER_DIED: S.STAGED},
    # No CANCEL from here: the rename may already have happened.
    S.COMMITTING: {E.COMMIT_DONE: S.COMMITTED, E.FAIL: S.FAILED, E.LOSE: S.UNKNOWN, E.WORKER_DIED: S.STAGED},
    S.COMMITTED: {},
    S.FAILED: {},
    S.CANCELLED: {},
    S.SKIPPED: {},
    S.UNKNOWN: {},
}

FINAL = frozenset(state for state, moves in TRANSITIONS.items() if not moves)


def advance(state: SaveState, event: SaveEvent) -> SaveState:
    """Return the next state.

    Raises:
        ValueError: The table has no such move; that is a bug of the caller.
    """
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise ValueError(f"a save that is {state.value} takes no {event.value}") from None
