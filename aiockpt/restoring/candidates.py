"""The checkpoints that may be restored, one after another: what is proven bad is passed over."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from aiockpt.errors import CheckpointCorruptError, NoUsableCheckpointError, StepNotFoundError
from aiockpt.restoring.choose import Candidate, choose
from aiockpt.storage.faults import NO_FAULTS, Faults
from aiockpt.storage.readers import OpenCheckpoint, open_checkpoint
from aiockpt.storage.run_directory import Committed

__all__ = ["Candidates", "OnBad", "first_good", "of_step"]

OnBad = Callable[[Committed, CheckpointCorruptError], None]
T = TypeVar("T")

_log = logging.getLogger("aiockpt.restore")
_MOST_LOOKS = 20


class Candidates:
    """Newest first, or the one that was asked for. Nothing is looked at before the first ``open_next``.

    With several ranks one of them opens; all pass over the same.

    Args:
        path: A run, or one step's directory.
        step: The only one to be used, or None.
        on_bad: Called with a checkpoint that is proven bad, before the next older one is opened; not for an explicit
            step, and not for a directory without a readable head, which is skipped alone.
        faults: Fault layer.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        step: int | None,
        *,
        on_bad: OnBad | None = None,
        faults: Faults = NO_FAULTS,
    ) -> None:
        self.skipped: dict[int, str] = {}
        """Steps that were passed over, with the reason."""
        self._path = path
        self._step = step
        self._on_bad = on_bad
        self._faults = faults
        self._is_explicit = step is not None
        self._left: deque[Candidate] | None = None
        self._damaged: deque[CheckpointCorruptError] = deque()
        self._current: Candidate | None = None
        self._bad: tuple[Committed, CheckpointCorruptError] | None = None
        self._passed: set[Candidate] = set()
        self._looks = 0

    def open_next(self) -> OpenCheckpoint | None:
        """Open the next one; None where none is left.

        Raises:
            CheckpointCorruptError: It is bad; ``pass_over`` goes on behind it.
            StepNotFoundError: The run does not have the step, or the checkpoint was removed meanwhile.
            CheckpointError: As ``choose`` and ``open_checkpoint``; or ``on_bad`` raised it.
        """
        self._hand_over()
        if self._left is None:
            self._look()
        if self._damaged:
            raise self._damaged.popleft()
        if not self._left:
            return None
        self._current = self._left.popleft()
        return open_checkpoint(self._current.path, faults=self._faults)

    def pass_over(self, error: CheckpointCorruptError | StepNotFoundError) -> None:
        """Go on behind the checkpoint that this was raised for.

        Raises:
            CheckpointCorruptError: No other checkpoint will do.
            StepNotFoundError: Likewise, or none stayed long enough.
        """
        current, self._current = self._current, None
        if self._is_explicit:
            raise error
        if isinstance(error, StepNotFoundError):  # retention was faster, so there is a newer one by now
            self._look_again(error)
            return
        assert error.step is not None, "what was chosen by its step is known by it"
        self.skipped[error.step] = f"{error.what}: {error.why}"
        _log.warning(
            "step %d is passed over, its checkpoint is bad: file %s, offset %s, checksum expected %s, found %s (%s)",
            error.step,
            error.file,
            error.offset,
            error.expected,
            error.found,
            error.why,
        )
        if current is not None and current.committed is not None:
            self._passed.add(current)
            self._bad = current.committed, error

    def none_left(self) -> None:
        """Return where there was nothing to restore.

        Raises:
            NoUsableCheckpointError: There was, and all of it is bad.
        """
        if not self.skipped:
            return
        path = os.path.abspath(os.fspath(self._path))
        raise NoUsableCheckpointError(
            f"no checkpoint of {path} is usable",
            why="; ".join(f"step {step}: {why}" for step, why in sorted(self.skipped.items(), reverse=True)),
            next='look at them with "aiockpt verify"; give another run or step, or start anew in another run',
            path=path,
            skipped=dict(self.skipped),
        )

    def _look(self) -> None:
        choice = choose(self._path, self._step)
        self._is_explicit = choice.explicit
        self._damaged = deque(error for error in choice.damaged if error.step not in self.skipped)
        self._left = deque(candidate for candidate in choice.candidates if candidate not in self._passed)

    def _look_again(self, error: StepNotFoundError) -> None:
        self._left = None
        self._looks += 1
        if self._looks == _MOST_LOOKS:
            raise StepNotFoundError(
                f"no checkpoint of {os.fspath(self._path)} stayed long enough to be opened",
                why=f"{_MOST_LOOKS} times in a row the one that was chosen had been removed",
                next="keep more checkpoints, or restore when the run is quieter",
                path=os.fspath(self._path),
            ) from error

    def _hand_over(self) -> None:
        bad, self._bad = self._bad, None
        if bad is not None and self._on_bad is not None:
            self._on_bad(*bad)


def first_good(candidates: Candidates, use_next: Callable[[], T]) -> T:
    """Return what comes of the first checkpoint that is not proven bad.

    Args:
        candidates: Told what was passed over.
        use_next: Opens and uses the next one; its ``CheckpointCorruptError`` sends us to the one behind it.

    Raises:
        CheckpointError: What ``use_next`` raised, where no other checkpoint will do.
    """
    while True:
        try:
            return use_next()
        except (CheckpointCorruptError, StepNotFoundError) as exc:
            candidates.pass_over(exc)


@contextmanager
def of_step(step: int) -> Iterator[None]:
    """Say of which step it is that something is corrupt."""
    try:
        yield
    except CheckpointCorruptError as exc:
        exc.step = step
        raise
