"""Reading by the run's writer: what it finds bad it renames, and what it restores decides the branch."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Mapping
from typing import Any

from aiockpt.coordinator import reading
from aiockpt.coordinator.held_run import HeldRun
from aiockpt.coordinator.meetings import Meetings
from aiockpt.coordinator.reading import Globs
from aiockpt.coordinator.results import Restored
from aiockpt.coordinator.saves import Saves
from aiockpt.coordinator.saving import Saving
from aiockpt.coordinator.spans import OpenSpan, Spans
from aiockpt.coordinator.votes import Votes
from aiockpt.errors import CheckpointCorruptError, StorageError
from aiockpt.restoring.run import RestoreOutcome, restore_run
from aiockpt.restoring.targets import Targets
from aiockpt.restoring.voting import ALONE, Voting
from aiockpt.staging.stager import Stager
from aiockpt.storage.faults import NO_FAULTS, Faults
from aiockpt.storage.run_directory import Committed, scan
from aiockpt.storage.verify import verify_checkpoint

__all__ = ["Restoring"]

_log = logging.getLogger("aiockpt.restore")


class Restoring:
    """``begin`` and ``finish`` run in the thread that owns the state, all else in a thread of the coordinator.

    Args:
        run: Directory of the run.
        claim: On it; the lists of rank 0 are used.
        saves: Of this Checkpointer.
        saving: Likewise.
        stager: Likewise.
        spans: Likewise.
        faults: Fault layer.
        rank: Of this trainer in its job.
        meetings: With the other ranks; None where there are none.
    """

    def __init__(
        self,
        run: str,
        claim: HeldRun,
        saves: Saves,
        saving: Saving,
        stager: Stager,
        spans: Spans,
        *,
        faults: Faults = NO_FAULTS,
        rank: int = 0,
        meetings: Meetings | None = None,
    ) -> None:
        self._faults = faults
        self._rank = rank
        self._meetings = meetings
        self._calls = itertools.count(1)
        self._run = run
        self._claim = claim
        self._saves = saves
        self._saving = saving
        self._stager = stager
        self._spans = spans

    def begin(self, state: Mapping[str, Any], *, include: Globs, exclude: Globs) -> Targets:
        """Look at the live state, after our own copies of it are done."""
        try:
            self._stager.sync_pending()
            return reading.begin(state, include=include, exclude=exclude)
        except BaseException as exc:
            if self._meetings is not None:  # the other ranks wait for this call
                votes = Votes(self._meetings, number=next(self._calls), claim="restore()", stop=threading.Event())
                votes.excuse(exc)
            raise

    def read(self, targets: Targets, *, step: int | None, strict: bool, stop: threading.Event) -> RestoreOutcome | None:
        """Choose a checkpoint and read it into the live tensors; ``stop`` ends that between two blocks."""
        outcome = restore_run(
            self._run,
            targets,
            step=step,
            strict=strict,
            on_bad=self._mark_bad,
            rank=self._rank,
            voting=self._voting(step, strict, stop),
            should_stop=stop.is_set,
            faults=self._faults,
        )
        if outcome is not None and self._rank == 0:
            self._mark_unreadable(outcome)
        return outcome

    def _voting(self, step: int | None, strict: bool, stop: threading.Event) -> Voting:
        """Return how the ranks decide; ``include`` and ``exclude`` are each rank's own."""
        if self._meetings is None:
            return ALONE
        given = [f"step={step}"] * (step is not None) + ["strict=False"] * (not strict)
        claim = f"restore({', '.join(given)})"
        return Votes(self._meetings, number=next(self._calls), claim=claim, stop=stop, faults=self._faults)

    def finish(self, outcome: RestoreOutcome | None, span: OpenSpan) -> Restored | None:
        """Give objects and containers their values, and begin the branch that goes on from here."""
        restored = reading.finish(outcome)
        if restored is not None:
            span.note(step=restored.step, path=restored.path, skipped=len(restored.skipped))
            self._begin_branch(restored)
        return restored

    def load(self, step: int | None, *, include: Globs, mmap: bool) -> dict[str, Any]:
        """Return a checkpoint as a fresh nested dict."""
        with self._spans.begin("load", step=step):
            return reading.load(self._run, step=step, include=include, mmap=mmap)

    def steps(self) -> list[int]:
        """Return the committed steps, ascending."""
        return reading.steps(self._run)

    def latest(self) -> int | None:
        """Return the newest step: the highest (term, ordinal)."""
        if self._rank:  # what stood at open is known to rank 0
            return next((known.step for known in scan(self._run).checkpoints), None)
        return next(iter(self._saves.checkpoints), None)

    def verify(self, step: int) -> int:
        """Read a checkpoint whole; returns its bytes."""
        with self._spans.begin("verify", step=step) as span:
            nbytes = verify_checkpoint(f"{self._run}/step-{step}")
            span.note(nbytes=nbytes)
            return nbytes

    def _mark_bad(self, committed: Committed, error: CheckpointCorruptError) -> None:
        self._claim.mark_bad(committed, str(error))
        self._saves.forget(committed.step)

    def _mark_unreadable(self, outcome: RestoreOutcome) -> None:
        """Only once an older one is restored: without it these are all there is, and the run must not look empty."""
        for unreadable in list(self._claim.bad):
            if unreadable.step in outcome.skipped:
                try:
                    self._claim.mark_bad(unreadable, unreadable.why)
                except StorageError as exc:  # all ranks have restored by now
                    _log.warning("step %d is damaged and stays under its name: %s", unreadable.step, exc)

    def _begin_branch(self, restored: Restored) -> None:
        """Steps that are newer than the restored one are an abandoned branch, which saving replaces."""
        left = [known for known in self._saves.checkpoints.values() if known.ordinal > restored.ordinal]
        self._saving.branch = frozenset(known.save_id for known in left)
        if left:
            _log.warning(
                "steps %s stand behind the restored step %d: saving one of them replaces it",
                ", ".join(str(step) for step in sorted(known.step for known in left)),
                restored.step,
            )
