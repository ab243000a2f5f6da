"""Which checkpoint is restored: the newest good one, or the one that was asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from aiockpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    NoUsableCheckpointError,
    StateMismatchError,
    StepNotFoundError,
)
from aiockpt.restoring.apply import MIXED, apply_steps, bump_versions
from aiockpt.restoring.checkpoint_view import CheckpointView
from aiockpt.restoring.choose import Choice, choose
from aiockpt.restoring.match import match
from aiockpt.restoring.plan import Plan, Step
from aiockpt.restoring.read import READ_THREADS, Reading, never
from aiockpt.restoring.targets import Targets
from aiockpt.storage.failures import storage_errors
from aiockpt.storage.faults import NO_FAULTS, FaultPoint, Faults
from aiockpt.storage.readers import OpenCheckpoint, open_checkpoint
from aiockpt.storage.run_directory import Committed

__all__ = ["RestoreOutcome", "apply_outcome", "first_good", "restore_run"]

OnBad = Callable[[Committed, CheckpointCorruptError], None]
T = TypeVar("T")

_log = logging.getLogger("aiockpt.restore")
_MOST_RESCANS = 20


@dataclass(slots=True)
class RestoreOutcome:
    """A checkpoint whose tensors are in place; ``apply_outcome`` gives values and objects theirs."""

    step: int
    path: str
    ordinal: int
    metadata: Any
    missing: tuple[str, ...]
    """Names of the live state that got nothing; only with ``strict=False``."""
    unexpected: tuple[str, ...]
    """Names of the checkpoint that nothing took; only with ``strict=False``."""
    skipped: dict[int, str]
    """Steps that were passed over, with the reason."""
    steps: list[Step] = field(default_factory=list)


def restore_run(
    path: str | os.PathLike[str],
    targets: Targets,
    *,
    step: int | None = None,
    strict: bool = True,
    on_bad: OnBad | None = None,
    rank: int = 0,
    should_stop: Callable[[], bool] = never,
    threads: int = READ_THREADS,
    faults: Faults = NO_FAULTS,
) -> RestoreOutcome | None:
    """Read a checkpoint into a live state; ``apply_outcome`` then ends it, in the thread that owns the state.

    Tensors are overwritten here, so nobody may use the state meanwhile. Everything but block checksums is checked
    before the first of them changes. A step is passed over only for proven corruption, with a warning.

    Args:
        path: A run, or one step's directory.
        targets: From ``read_targets``.
        step: The step to restore; None takes the newest good one by (term, ordinal).
        strict: Whether what does not fit is an error.
        on_bad: Called with a checkpoint that is proven bad, before the next older one is opened; not for an explicit
            step, and not for a directory without a readable head, which is skipped alone.
        rank: Of this process in its job: what each rank saved of its own is taken from the same one.
        should_stop: Asked between blocks.
        threads: That read at once.
        faults: Fault layer.

    Returns:
        None where the run has no checkpoint yet.

    Raises:
        StateMismatchError: The newest good checkpoint does not fit the state.
        StepNotFoundError: ``step``, or the directory, is not there.
        CheckpointCorruptError: ``step``, or the directory, is bad.
        NoUsableCheckpointError: There are checkpoints, and all are bad.
        ConfigError: The path is no run or step, or of a newer format; a pattern fits nothing.
        StorageError: Something cannot be read; no older step is taken for that.
        RestoreError: ``should_stop`` said so.
    """
    attempt = _Attempt(targets, strict=strict, rank=rank, should_stop=should_stop, threads=threads, faults=faults)
    with attempt.says_mixed():
        found = first_good(path, step, attempt.restore, on_bad=on_bad)
        if found is None:
            return None
        outcome, skipped = found
        outcome.skipped = skipped
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


def first_good(
    path: str | os.PathLike[str],
    step: int | None,
    use: Callable[[OpenCheckpoint], T],
    *,
    on_bad: OnBad | None = None,
) -> tuple[T, dict[int, str]] | None:
    """Use the first checkpoint that is not proven bad, newest first.

    Args:
        path: A run, or one step's directory.
        step: The only one to be used, or None.
        use: Called with an open checkpoint; its ``CheckpointCorruptError`` sends us to the next older one.
        on_bad: See ``restore_run``.

    Returns:
        (what ``use`` returned, steps passed over with the reason), or None where there is nothing yet.

    Raises:
        CheckpointError: See ``restore_run``.
    """
    skipped: dict[int, str] = {}
    for _ in range(_MOST_RESCANS):
        choice = choose(path, step)
        skipped |= choice.unreadable
        try:
            return _first_of(choice, use, skipped, on_bad)
        except StepNotFoundError:  # retention was faster, so there is a newer one by now
            if choice.explicit:
                raise
    raise StepNotFoundError(
        f"no checkpoint of {os.fspath(path)} stayed long enough to be opened",
        why=f"{_MOST_RESCANS} times in a row the one that was chosen had been removed",
        next="keep more checkpoints, or restore when the run is quieter",
        path=os.fspath(path),
    )


def _first_of(
    choice: Choice, use: Callable[[OpenCheckpoint], T], skipped: dict[int, str], on_bad: OnBad | None
) -> tuple[T, dict[int, str]] | None:
    for path, committed in choice.candidates:
        try:
            with open_checkpoint(path) as checkpoint, _of_step(checkpoint.manifest.head.step):
                return use(checkpoint), skipped
        except CheckpointCorruptError as exc:
            if committed is None or choice.explicit:
                raise
            bad = exc
        _pass_over(committed, bad, skipped)
        if on_bad is not None:
            on_bad(committed, bad)
    if not skipped:
        return None
    raise NoUsableCheckpointError(
        f"no checkpoint of {choice.path} is usable",
        why="; ".join(f"step {step}: {why}" for step, why in sorted(skipped.items(), reverse=True)),
        next='look at them with "aiockpt verify"; give an explicit step or another run, or start anew in another one',
        path=choice.path,
        skipped=dict(skipped),
    )


def _pass_over(committed: Committed, bad: CheckpointCorruptError, skipped: dict[int, str]) -> None:
    skipped[committed.step] = f"{bad.what}: {bad.why}"
    _log.warning(
        "step %d is passed over, its checkpoint is bad: file %s, offset %s, checksum expected %s, found %s (%s)",
        committed.step,
        bad.file,
        bad.offset,
        bad.expected,
        bad.found,
        bad.why,
    )


class _Attempt:
    """One restore, over as many checkpoints as it takes."""

    def __init__(
        self,
        targets: Targets,
        *,
        strict: bool,
        rank: int,
        should_stop: Callable[[], bool],
        threads: int,
        faults: Faults,
    ) -> None:
        self._targets = targets
        self._strict = strict
        self._rank = rank
        self._should_stop = should_stop
        self._threads = threads
        self._faults = faults
        self._changed: dict[Any, str] = {}
        """Live tensors that a bad checkpoint may have overwritten, as ``Plan.live_names``."""

    def restore(self, checkpoint: OpenCheckpoint) -> RestoreOutcome:
        """Read one checkpoint into the state."""
        manifest, head = f"{checkpoint.path}/manifest.json", checkpoint.manifest.head
        view = CheckpointView(checkpoint.manifest, manifest, rank=self._rank)
        plan = match(self._targets, view, strict=self._strict)
        self._refuse_mixture(plan, head.step)
        view.decode_needed()
        metadata = view.metadata()
        reading = Reading(checkpoint, view, plan.live, plan.fresh)
        with storage_errors("a checkpoint was not read", checkpoint.path):
            self._faults.at(FaultPoint.TRAINER_RESTORING, checkpoint.path)
        devices = self._targets.cuda_devices()
        _wait_for(devices)  # what the program enqueued may still read the old values
        try:
            reading.run(threads=self._threads, should_stop=self._should_stop)
        finally:
            if reading.live_changed:
                self._changed |= plan.live_names
                bump_versions(tensor for _, tensor in plan.live)
        _wait_for(devices)
        plan.build()
        _warn_of_misfits(head.step, plan.mismatched)
        return RestoreOutcome(
            step=head.step,
            path=checkpoint.path,
            ordinal=head.ordinal,
            metadata=metadata,
            missing=tuple(plan.missing),
            unexpected=tuple(plan.unexpected),
            skipped={},
            steps=plan.steps,
        )

    def _refuse_mixture(self, plan: Plan, step: int) -> None:
        """Refuse an older checkpoint that lacks what a newer, bad one has overwritten; only strict=False gets here."""
        left = plan.leaves(self._changed)
        if left:
            raise StateMismatchError(
                f"step {step} does not have {len(left)} of the tensors that a newer, bad checkpoint has overwritten",
                why=", ".join(left[:20]) + (", …" if len(left) > 20 else ""),
                next="start again, and restore with exclude= for what the older steps do not have",
                step=step,
                missing=tuple(left),
                unexpected=(),
                mismatched=(),
            )

    @contextmanager
    def says_mixed(self) -> Iterator[None]:
        """Add to an error that leaves live tensors half overwritten that they are."""
        try:
            yield
        except CheckpointError as exc:
            if self._changed:
                exc.why = f"{exc.why}; {MIXED}" if exc.why else MIXED
                if "Nothing live was changed" in exc.next:
                    exc.next = exc.next.replace("Nothing live was changed", "Live tensors were changed already")
            raise
        except BaseException as exc:
            if self._changed:
                exc.add_note(MIXED)
            raise


@contextmanager
def _of_step(step: int) -> Iterator[None]:
    try:
        yield
    except CheckpointCorruptError as exc:
        exc.step = step
        raise


def _wait_for(devices: Iterable[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)


def _warn_of_misfits(step: int, mismatched: list[tuple[str, str]]) -> None:
    if mismatched:
        shown = "; ".join(f"{name}: {why}" for name, why in mismatched[:20])
        _log.warning("step %d was restored without %d entries that do not fit: %s", step, len(mismatched), shown)
