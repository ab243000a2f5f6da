"""One restore into one live state, over as many checkpoints as it takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from aiockpt.errors import CheckpointError, StateMismatchError
from aiockpt.restoring.apply import MIXED, bump_versions
from aiockpt.restoring.checkpoint_view import CheckpointView
from aiockpt.restoring.match import match
from aiockpt.restoring.plan import Plan, Step
from aiockpt.restoring.read import Reading
from aiockpt.restoring.targets import Targets
from aiockpt.storage.failures import storage_errors
from aiockpt.storage.faults import FaultPoint, Faults
from aiockpt.storage.readers import OpenCheckpoint

__all__ = ["Attempt", "Prepared", "RestoreOutcome"]

_log = logging.getLogger("aiockpt.restore")


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


@dataclass(slots=True)
class Prepared:
    """A checkpoint that fits: all of it but block checksums was checked."""

    checkpoint: OpenCheckpoint
    plan: Plan
    reading: Reading
    metadata: Any


class Attempt:
    """Remembers which live tensors a checkpoint that turned out bad may have overwritten.

    Args:
        targets: From ``read_targets``.
        strict: Whether what does not fit is an error.
        rank: Of this process in its job.
        should_stop: Asked between blocks.
        threads: That read at once.
        faults: Fault layer.
    """

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
        self.others_changed = False
        """Whether other ranks may have overwritten parts of the same state."""

    def prepare(self, checkpoint: OpenCheckpoint) -> Prepared:
        """Match one checkpoint with the state, and check it; nothing live changes.

        Raises:
            StateMismatchError: They do not fit.
            CheckpointCorruptError: A header or the manifest contradicts itself.
            StorageError: Something cannot be read.
        """
        manifest = checkpoint.manifest
        view = CheckpointView(manifest, f"{checkpoint.path}/manifest.json", rank=self._rank)
        plan = match(self._targets, view, strict=self._strict)
        self._refuse_mixture(plan, manifest.head.step)
        view.decode_needed()
        metadata = view.metadata()
        return Prepared(checkpoint, plan, Reading(checkpoint, view, plan.live, plan.fresh), metadata)

    def read(self, prepared: Prepared) -> RestoreOutcome:
        """Read its bytes into the state.

        Raises:
            CheckpointCorruptError: A block is bad; live tensors may have been overwritten.
            StorageError: Something cannot be read; likewise.
            RestoreError: ``should_stop`` said so; likewise.
        """
        checkpoint, plan, reading = prepared.checkpoint, prepared.plan, prepared.reading
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
        head = checkpoint.manifest.head
        _warn_of_misfits(head.step, plan.mismatched)
        return RestoreOutcome(
            step=head.step,
            path=checkpoint.path,
            ordinal=head.ordinal,
            metadata=prepared.metadata,
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
            if self._is_mixed:
                exc.why = f"{exc.why}; {MIXED}" if exc.why else MIXED
                if "Nothing live was changed" in exc.next:
                    exc.next = exc.next.replace("Nothing live was changed", "Live tensors were changed already")
            raise
        except BaseException as exc:
            if self._is_mixed:
                exc.add_note(MIXED)
            raise

    @property
    def _is_mixed(self) -> bool:
        return bool(self._changed) or self.others_changed


def _wait_for(devices: Iterable[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)


def _warn_of_misfits(step: int, mismatched: list[tuple[str, str]]) -> None:
    if mismatched:
        shown = "; ".join(f"{name}: {why}" for name, why in mismatched[:20])
        _log.warning("step %d was restored without %d entries that do not fit: %s", step, len(mismatched), shown)
