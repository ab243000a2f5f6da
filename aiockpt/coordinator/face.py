"""What both faces share: the constructor, the calls that never wait, and refusing what makes no sense."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any, NoReturn, Self

from aiockpt.config import Every, Latest, Options, RestartPolicy, Snapshot
from aiockpt.coordinator.coordinator import Coordinator
from aiockpt.coordinator.results import Saved
from aiockpt.coordinator.save_record import SaveRecord
from aiockpt.coordinator.statistics import Statistics
from aiockpt.observing import Observer

__all__ = ["Face", "Handle", "add_notes", "raise_failures"]


class Handle:
    """A save in flight. Made by ``Checkpointer.save``; may be waited for from any thread or task, more than once."""

    def __init__(self, record: SaveRecord, coordinator: Coordinator) -> None:
        self._record = record
        self._coordinator = coordinator

    @property
    def step(self) -> int:
        """The step that it saves."""
        return self._record.step

    @property
    def phase(self) -> str:
        """Where it is: planned, staging, staged, written, committing, or how it ended."""
        return self._record.state.value

    @property
    def timings(self) -> dict[str, float]:
        """Seconds, as far as they are known; see ``Saved.timings``."""
        return dict(self._record.timings)

    def done(self) -> bool:
        """Tell whether the outcome is known."""
        return self._record.outcome.done()

    def cancel(self) -> None:
        """Ask to give the save up; has no effect once it commits. The outcome says which came first."""
        self._coordinator.cancel(self._record)

    def _outcome(self) -> Saved | None:
        """Return or raise the outcome that is known."""
        error = self._record.outcome.exception()
        if error is None:
            return self._record.outcome.result()
        self._record.heard = True
        raise error

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of step {self.step}: {self.phase}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Save belongs to its process: pass on its step, or the result of awaiting it")


class Face:
    """Base of both Checkpointers."""

    def __init__(
        self,
        run: str | os.PathLike[str],
        *,
        keep: Latest | None = None,
        every: Every | None = None,
        snapshot: Snapshot = "guarded",
        capacity: int | None = None,
        process_group: Any = None,
        replicated: Sequence[str] = (),
        restart: RestartPolicy = RestartPolicy(),  # noqa: B008  # frozen
        observer: Observer | None = None,
        start_timeout: float | None = 60,
        stall_timeout: float | None = 60,
        io_timeout: float | None = 600,
        arrival_timeout: float | None = 600,
        linger_timeout: float | None = 60,
        close_timeout: float | None = 600,
    ) -> None:
        """Check the arguments; nothing is opened yet.

        Args:
            run: The run directory; made by ``open()`` where it is missing. One writer at a time.
            keep: ``Latest(n)`` removes older checkpoints after a commit; None keeps all.
            every: What ``due()`` goes by.
            snapshot: ``"guarded"`` copies what belongs to an optimizer behind the training thread and makes its next
                ``step()`` wait; ``"inline"`` copies everything before ``save()`` returns.
            capacity: Most bytes of shared memory to take.
            process_group: The ranks that save together, a ``torch.distributed.ProcessGroup`` of any backend; only its
                store is used, never a collective. None is the default group where torch.distributed is initialised,
                else this process alone.
            replicated: Globs over dotted names of plain tensors that are equal on all ranks, as in ``["model.*"]``:
                they are written once. What DTensor and DDP say of themselves need not be named.
            restart: When a dead worker is started again.
            observer: Told of what happens when, from a thread of its own.
            start_timeout: Seconds for the worker to come up; here and below None is no limit.
            stall_timeout: Seconds without a sign of life from the worker, or for a pending copy.
            io_timeout: Seconds for one write, sync or rename to make progress.
            arrival_timeout: Seconds for all ranks to call ``save()``, once one has: more than what only some of them do
                between two saves, such as an evaluation.
            linger_timeout: Seconds that a worker may outlive its trainer to finish what was staged.
            close_timeout: Seconds for all of ``close()``.

        Raises:
            ConfigError: Names the argument.
        """
        options = Options.make(
            run,
            keep=keep,
            every=every,
            snapshot=snapshot,
            capacity=capacity,
            process_group=process_group,
            replicated=replicated,
            restart=restart,
            observer=observer,
            start_timeout=start_timeout,
            stall_timeout=stall_timeout,
            io_timeout=io_timeout,
            arrival_timeout=arrival_timeout,
            linger_timeout=linger_timeout,
            close_timeout=close_timeout,
        )
        self._coordinator = Coordinator(options)
        finalizer = weakref.finalize(self, self._coordinator.abandon)
        finalizer.atexit = False  # at exit the coordinator's own hook runs, before threads are joined

    @property
    def run(self) -> str:
        """Absolute path of the run directory."""
        return self._coordinator.options.run

    def due(self, step: int) -> str | None:
        """Return why ``step`` should be saved now, or None; the reason stands until ``save()`` is called."""
        return self._coordinator.due(step)

    def request_save(self, reason: str = "requested") -> None:
        """Make ``due()`` answer ``reason`` at the next step; safe in a signal handler and from any thread."""
        self._coordinator.request_save(reason)

    def statistics(self) -> Statistics:
        """Return the figures since ``open()``; quick, from any thread."""
        return self._coordinator.statistics()

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{type(self).__name__} of {self.run}>"

    def __copy__(self) -> Self:
        raise TypeError(_NO_COPY)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        raise TypeError(_NO_COPY)

    def __reduce__(self) -> NoReturn:
        raise TypeError(_NO_COPY)


_NO_COPY = (
    "a Checkpointer owns a thread, a process and the run's lock, and cannot be copied or pickled: "
    "pass the run's path and open another one where it is needed, or read with aiockpt.load(path)"
)


def raise_failures(failures: list[BaseException]) -> None:
    """Raise what nobody was told of: the one error, or a group of several."""
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise BaseExceptionGroup("several saves failed", failures)


def add_notes(error: BaseException, failures: list[BaseException]) -> None:
    """Tell of failed saves on the error that leaves the block; it goes on as the same object."""
    for failure in failures:
        error.add_note(f"A save failed as well: {failure}")
