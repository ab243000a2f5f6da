"""The blocking face: the same names and signatures as the async one, without ``await``.

It works in a classic script, in any thread, and under a running event loop (notebooks), because the coordinator has
a loop and a thread of its own.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Mapping
from concurrent import futures
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar, cast, overload

from aiockpt.coordinator import reading
from aiockpt.coordinator.face import Face, Handle, add_notes, raise_failures
from aiockpt.coordinator.results import Restored, Saved
from aiockpt.coordinator.saving import WhenBusy

__all__ = ["Checkpointer", "Save", "load", "restore", "steps"]

_log = logging.getLogger("aiockpt.coordinator")

R_co = TypeVar("R_co", bound="Saved | None", covariant=True)


class Save(Handle, Generic[R_co]):
    """A save in flight; see ``aiockpt.Save``."""

    def result(self, timeout: float | None = None) -> R_co:
        """Wait until the checkpoint is durable; see ``aiockpt.Save.result``."""
        self._record.listeners += 1
        try:
            self._record.outcome.exception(timeout)
            return cast("R_co", self._outcome())
        finally:
            self._record.listeners -= 1

    def wait_staged(self) -> None:
        """Wait until the state may be written to by others than its optimizers; see ``aiockpt.Save.wait_staged``."""
        self._record.staged.result()


class Checkpointer(Face):
    """Saves and restores the checkpoints of one run; a context manager. See ``aiockpt.Checkpointer``."""

    def open(self) -> None:
        """Take the run and start the worker; see ``aiockpt.Checkpointer.open``."""
        opening = self._coordinator.open()
        try:
            opening.result()
        except BaseException:
            self._coordinator.close(drain=False).result()
            raise

    def close(self, drain: bool = True) -> None:
        """Wait until all saves are durable, then end the worker; see ``aiockpt.Checkpointer.close``."""
        ended = self._coordinator.close(drain=drain)
        try:
            ended.result()
        except KeyboardInterrupt:
            self._coordinator.leave()
            futures.wait([ended], 5)
            raise
        raise_failures(self._coordinator.unheard())

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self._coordinator.close(drain=True).result()
        except BaseException:  # noqa: BLE001  # a second Ctrl-C ends the wait; ``error`` goes on
            self._coordinator.leave()
            _log.warning("closing was interrupted; what is staged is left to the worker")
        failures = self._coordinator.unheard()
        add_notes(error, failures)
        for failure in failures:
            _log.error("a save failed while %s left the block:\n%s", type(error).__name__, failure)

    # ---- saving

    @overload
    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        timeout: float | None = None,
        when_busy: Literal["wait", "raise"] = "wait",
        overwrite: bool = False,
        metadata: Any = None,
    ) -> Save[Saved]: ...

    @overload
    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        timeout: float | None = None,
        when_busy: WhenBusy,
        overwrite: bool = False,
        metadata: Any = None,
    ) -> Save[Saved | None]: ...

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        timeout: float | None = None,
        when_busy: WhenBusy = "wait",
        overwrite: bool = False,
        metadata: Any = None,
    ) -> Save[Any]:
        """Take a snapshot of ``state``; see ``aiockpt.Checkpointer.save``."""
        record = self._coordinator.saving.save(
            step, state, timeout=timeout, when_busy=when_busy, overwrite=overwrite, metadata=metadata
        )
        return Save(record, self._coordinator)

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Make the shared memory that saving ``state`` needs, so that no save waits for it."""
        self._coordinator.prepare(state).result()

    def wait_ready(self) -> None:
        """Wait until ``save()`` would not wait for a slot."""
        self._coordinator.when_ready().result()

    def wait_idle(self) -> None:
        """Wait until every save has its outcome."""
        self._coordinator.when_idle().result()

    # ---- reading

    def restore(
        self,
        state: Mapping[str, Any],
        *,
        step: int | None = None,
        strict: bool = True,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
    ) -> Restored | None:
        """Restore into the live objects of ``state``, in place; see ``aiockpt.Checkpointer.restore``."""
        with self._coordinator.spans.begin("restore", step=step) as span:
            targets = self._coordinator.restoring.begin(state, include=include, exclude=exclude)
            stop = threading.Event()
            under_way = self._coordinator.read(lambda r: r.read(targets, step=step, strict=strict, stop=stop))
            try:
                outcome = under_way.result()
            except BaseException:
                stop.set()  # and nobody may use the state while a thread still writes to it
                under_way.exception()
                raise
            return self._coordinator.restoring.finish(outcome, span)

    def load(
        self, step: int | None = None, *, include: str | Iterable[str] | None = None, mmap: bool = False
    ) -> dict[str, Any]:
        """Return a checkpoint as a fresh nested dict; see ``aiockpt.load``."""
        return self._coordinator.read(lambda r: r.load(step, include=include, mmap=mmap)).result()

    def steps(self) -> list[int]:
        """Return the committed steps, ascending."""
        return self._coordinator.read(lambda r: r.steps()).result()

    def latest(self) -> int | None:
        """Return the step that ``restore`` would try first; None where there is none."""
        return self._coordinator.read(lambda r: r.latest()).result()

    def verify(self, step: int) -> int:
        """Read a checkpoint whole and compare every checksum; see ``aiockpt.Checkpointer.verify``."""
        return self._coordinator.read(lambda r: r.verify(step)).result()


def load(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    include: str | Iterable[str] | None = None,
    mmap: bool = False,
) -> dict[str, Any]:
    """Return a checkpoint as a fresh nested dict, without a writer; see ``aiockpt.load``."""
    return reading.load(path, step=step, include=include, mmap=mmap)


def restore(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    step: int | None = None,
    strict: bool = True,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> Restored | None:
    """Restore into the live objects of ``state`` without a writer; see ``aiockpt.restore``."""
    targets = reading.begin(state, include=include, exclude=exclude)
    return reading.finish(reading.read(path, targets, step=step, strict=strict))


def steps(run: str | os.PathLike[str]) -> list[int]:
    """Return the committed steps of a run, ascending, without a writer."""
    return reading.steps(run)
