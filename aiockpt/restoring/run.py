"""A restore: round by round, until a checkpoint is in the live state, on all ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from aiockpt.format.names import step_name
from aiockpt.restoring.apply import apply_steps
from aiockpt.restoring.attempt import Attempt, Prepared, RestoreOutcome
from aiockpt.restoring.candidates import Candidates, OnBad, first_good, of_step
from aiockpt.restoring.read import READ_THREADS, never
from aiockpt.restoring.targets import Targets
from aiockpt.restoring.voting import ALONE, Voting, voted
from aiockpt.storage.faults import NO_FAULTS, Faults
from aiockpt.storage.readers import OpenCheckpoint
from aiockpt.storage.seen import Seen, open_seen

__all__ = ["RestoreOutcome", "apply_outcome", "restore_run"]


def restore_run(
    path: str | os.PathLike[str],
    targets: Targets,
    *,
    step: int | None = None,
    strict: bool = True,
    on_bad: OnBad | None = None,
    rank: int = 0,
    voting: Voting = ALONE,
    should_stop: Callable[[], bool] = never,
    threads: int = READ_THREADS,
    faults: Faults = NO_FAULTS,
) -> RestoreOutcome | None:
    """Read a checkpoint into a live state; ``apply_outcome`` then ends it, in the thread that owns the state.

    Tensors are overwritten here, so nobody may use the state meanwhile. Everything but block checksums is checked
    before the first of them changes, on any rank. A step is passed over only for proven corruption, by all ranks, with
    a warning.

    Args:
        path: A run, or one step's directory; with several ranks a run.
        targets: From ``read_targets``.
        step: The step to restore; None takes the newest good one by (term, ordinal).
        strict: Whether what does not fit is an error.
        on_bad: As ``Candidates`` takes it; called on the rank that leads alone.
        rank: Of this process in its job: what each rank saved of its own is taken from the same one.
        voting: How the ranks decide together.
        should_stop: Asked between blocks, and while waiting for a file.
        threads: That read at once.
        faults: Fault layer.

    Returns:
        None where the run has no checkpoint yet.

    Raises:
        StateMismatchError: The newest good checkpoint does not fit the state, of some rank.
        StepNotFoundError: ``step``, or the directory, is not there.
        CheckpointCorruptError: ``step``, or the directory, is bad.
        NoUsableCheckpointError: There are checkpoints, and all are bad.
        ConfigError: The path is no run or step, or of a newer format; a pattern fits nothing.
        StorageError: Something cannot be read, on some rank; no older step is taken for that.
        RestoreError: ``should_stop`` said so.
        CheckpointError: What ``voting`` raises where another rank failed.
    """

    def stops() -> bool:
        return should_stop() or voting.is_over()

    attempt = Attempt(targets, strict=strict, rank=rank, should_stop=stops, threads=threads, faults=faults)
    candidates = Candidates(path, step, on_bad=on_bad, faults=faults)
    rounds = _Rounds(path, candidates, attempt, voting, stops, faults)
    with attempt.says_mixed():
        outcome = first_good(candidates, rounds.next)
    if outcome is not None:
        outcome.skipped = candidates.skipped
    return outcome


def apply_outcome(outcome: RestoreOutcome) -> RestoreOutcome:
    """Finish a restore in the thread that owns the state; returns the outcome with the last names.

    Raises:
        StateMismatchError: A module with loading of its own refused what was saved.
        Exception: What the user's ``load_state_dict`` raised.
    """
    missing, unexpected = apply_steps(outcome.steps)
    outcome.missing += tuple(name for name in missing if name not in outcome.missing)
    outcome.unexpected += tuple(name for name in unexpected if name not in outcome.unexpected)
    outcome.steps = []
    return outcome


@dataclass(frozen=True, slots=True)
class _Rounds:
    run: str | os.PathLike[str]
    candidates: Candidates
    attempt: Attempt
    voting: Voting
    should_stop: Callable[[], bool]
    faults: Faults

    def next(self) -> RestoreOutcome | None:
        """Try the next checkpoint, with all ranks; None where there is none and none was passed over."""
        attempt, voting = self.attempt, self.voting
        with ExitStack() as held:
            found = self._find(held) if voting.leads else None
            seen = voting.propose(None if found is None else _seen(found), None)
            if seen is None:
                self.candidates.none_left()
                return None
            with of_step(seen.step):
                prepared = voted(voting.go, partial(self._prepare, found, seen, held))
                attempt.others_changed = voting.is_shared
                return voted(voting.done, partial(attempt.read, prepared))

    def _find(self, held: ExitStack) -> OpenCheckpoint | None:
        """Open the next candidate; the other ranks wait for it, and must hear of what fails."""
        try:
            found = self.candidates.open_next()
        except BaseException as exc:
            self.voting.propose(None, exc)
            raise
        return None if found is None else held.enter_context(found)

    def _prepare(self, found: OpenCheckpoint | None, seen: Seen, held: ExitStack) -> Prepared:
        if found is None:
            path = f"{os.path.abspath(os.fspath(self.run))}/{step_name(seen.step)}"
            found = held.enter_context(open_seen(path, seen, should_stop=self.should_stop, faults=self.faults))
        return self.attempt.prepare(found)


def _seen(found: OpenCheckpoint) -> Seen:
    head = found.manifest.head
    return Seen(head.step, head.save_id, found.manifest_nbytes, found.manifest_sum)
