"""The async face: the coordinator's futures, awaited on the caller's loop, whichever anyio runs on."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Generic, Literal, NoReturn, Self, TypeVar, cast, overload

import anyio
import anyio.lowlevel
import anyio.to_thread

from aiockpt.coordinator import reading
from aiockpt.coordinator.face import Face, Handle, add_notes, raise_failures
from aiockpt.coordinator.results import Restored, Saved
from aiockpt.coordinator.saving import WhenBusy

__all__ = ["Checkpointer", "Save", "load", "restore", "steps"]

_log = logging.getLogger("aiockpt.coordinator")

T = TypeVar("T")
R_co = TypeVar("R_co", bound="Saved | None", covariant=True)


async def _wait(future: Future[T]) -> T:
    """Wait for a future of the coordinator. Cancelling the wait leaves what it stands for alone."""
    if future.done():
        await anyio.lowlevel.checkpoint()
        return future.result()
    done = anyio.Event()
    token = anyio.lowlevel.current_token().native_token
    # asyncio's loop and trio's token name it differently; both only wake the loop, and never wait for it.
    wake = getattr(token, "call_soon_threadsafe", None) or getattr(token, "run_sync_soon")  # noqa: B009  # either one

    def on_done(_: Future[T]) -> None:
        try:
            wake(done.set)
        except RuntimeError:  # that loop has ended, and whoever waited there with it
            return

    future.add_done_callback(on_done)
    await done.wait()
    return future.result()


class Save(Handle, Generic[R_co]):
    """A save in flight; ``await save`` waits until it is durable."""

    async def result(self, timeout: float | None = None) -> R_co:
        """Wait until the checkpoint is durable.

        Args:
            timeout: Seconds; None is no limit. It ends this wait, never the save.

        Returns:
            ``Saved``; None where the save was skipped.

        Raises:
            TimeoutError: The time is up; the save goes on.
            CheckpointError: Why there is no checkpoint.
        """
        self._record.listeners += 1
        try:
            with anyio.fail_after(timeout):
                while not self.done():
                    await _wait_quietly(self._record.outcome)
            await anyio.lowlevel.checkpoint()
            return cast("R_co", self._outcome())
        finally:
            self._record.listeners -= 1

    def __await__(self) -> Generator[Any, Any, R_co]:
        return self.result().__await__()

    async def wait_staged(self) -> None:
        """Wait until the state may be written to by others than its optimizers.

        The worker has all that it needs then: should this process die, it finishes the save alone.

        Raises:
            CheckpointError: Why the save failed, if it did before.
        """
        await _wait(self._record.staged)


async def _wait_quietly(future: Future[Any]) -> None:
    """Wait for a future without asking how it ended."""
    with contextlib.suppress(Exception):
        await _wait(future)


class Checkpointer(Face):
    """Saves and restores the checkpoints of one run; an async context manager.

    ``async with`` opens the run and its worker; leaving it waits until all is durable and raises what failed.
    """

    async def open(self) -> None:
        """Take the run and start the worker.

        Raises:
            ConfigError: The directory is none, is foreign, of a newer format, or taken by another job.
            StorageError: The operating system refused something.
            WorkerStartError: The worker did not come up within ``start_timeout``.

        Cancellation: everything that was opened is closed again.
        """
        opening = self._coordinator.open()
        try:
            await _wait(opening)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await _wait(self._coordinator.close(drain=False))
            raise

    async def close(self, drain: bool = True) -> None:
        """Wait until all saves are durable, then end the worker and release the run; calling it again does nothing.

        Args:
            drain: False cancels what is not committed.

        Raises:
            CheckpointError: A save failed and nobody was told; several are one ExceptionGroup.

        Cancellation: ends the wait; staged saves are left to the worker.
        """
        ended = self._coordinator.close(drain=drain)
        try:
            await _wait(ended)
        except anyio.get_cancelled_exc_class():
            self._coordinator.leave()
            with anyio.move_on_after(5, shield=True):
                await _wait_quietly(ended)
            raise
        raise_failures(self._coordinator.unheard())

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            await self.close()
            return
        ended = self._coordinator.close(drain=True)
        try:
            with anyio.CancelScope(shield=True):
                await _wait(ended)
        except BaseException:  # noqa: BLE001  # a second Ctrl-C ends the wait; ``error`` goes on
            self._coordinator.leave()
            _log.warning("closing was interrupted; what is staged is left to the worker")
        failures = self._coordinator.unheard()
        add_notes(error, failures)
        for failure in failures:
            _log.error("a save failed while %s left the block:\n%s", type(error).__name__, failure)

    def __enter__(self) -> NoReturn:
        raise TypeError("use 'async with aiockpt.Checkpointer(…)', or 'with aiockpt.blocking.Checkpointer(…)'")

    def __exit__(self, *_: object) -> None:
        """Only here so that Python calls ``__enter__``, which says what to use."""

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
        """Take a snapshot of ``state``; a plain call, which returns when training may go on.

        Args:
            step: Training step, an int >= 0 that has no checkpoint yet.
            state: Nested mapping of tensors, modules, optimizers, values and objects with ``state_dict()``.
            timeout: Seconds until the save is given up if it is not committing yet; None is no limit.
            when_busy: While the save before is being written: ``"wait"`` holds this thread, ``"skip"`` gives a Save
                whose result is None, ``"raise"`` raises SaveBusyError.
            overwrite: Replace the checkpoint of this step.
            metadata: Any value that a checkpoint can hold; comes back from ``restore``.

        Returns:
            A handle; ``await`` it, or leave it to the next ``save()`` and to ``close()`` to tell of a failure.

        Raises:
            ConfigError: A bad argument.
            UsageError: Before open, after close, from a forked child, from two threads at once.
            UnsupportedValueError: The state holds what cannot be saved; names it.
            StepExistsError: The run has this step.
            SaveBusyError: See ``when_busy``.
            CheckpointError: An earlier save's failure that nobody was told of; this save was not begun.

        Does not yield: copying what must be copied holds the calling thread on purpose.
        """
        record = self._coordinator.saving.save(
            step, state, timeout=timeout, when_busy=when_busy, overwrite=overwrite, metadata=metadata
        )
        return Save(record, self._coordinator)

    async def prepare(self, state: Mapping[str, Any]) -> None:
        """Make the shared memory that saving ``state`` needs, so that no save waits for it.

        Raises:
            StorageError: The machine does not carry it; ``errno`` is ENOMEM.
            UnsupportedValueError: The state holds what cannot be saved.
        """
        await _wait(self._coordinator.prepare(state))

    async def wait_ready(self) -> None:
        """Wait until ``save()`` would not wait for a slot."""
        await _wait(self._coordinator.when_ready())

    async def wait_idle(self) -> None:
        """Wait until every save has its outcome; failures are told by their handles, the next save, or close."""
        await _wait(self._coordinator.when_idle())

    # ---- reading

    async def restore(
        self,
        state: Mapping[str, Any],
        *,
        step: int | None = None,
        strict: bool = True,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
    ) -> Restored | None:
        """Restore into the live objects of ``state``, in place.

        With several ranks all call it, with the same ``step`` and ``strict``; it returns once every rank has its part,
        and what fails on one of them fails on all.

        Args:
            state: As given to ``save``.
            step: None is the newest good one; a damaged newest is passed over with a warning.
            strict: False takes what fits and reports the rest in the result.
            include: Globs over dotted names, such as ``model.*``; None is everything.
            exclude: Globs to leave out.

        Returns:
            What was restored; None where the run has no checkpoint yet.

        Raises:
            StateMismatchError: Lists all that does not fit; nothing live was changed.
            StepNotFoundError: ``step`` is not there.
            CheckpointCorruptError: ``step`` is damaged.
            NoUsableCheckpointError: There are checkpoints and none is good.
            StorageError: A checkpoint cannot be read for another reason than damage; names rank and host.
            PeerFailedError: Another rank is gone, did not come, or was cancelled.

        Cancellation: ends the reading at the next block, on all ranks; the live state is mixed then, and must be
        restored again.
        """
        with self._coordinator.spans.begin("restore", step=step) as span:
            targets = self._coordinator.restoring.begin(state, include=include, exclude=exclude)
            stop = threading.Event()
            under_way = self._coordinator.read(lambda r: r.read(targets, step=step, strict=strict, stop=stop))
            try:
                outcome = await _wait(under_way)
            except BaseException:
                stop.set()  # and nobody may use the state while a thread still writes to it
                with anyio.CancelScope(shield=True):
                    await _wait_quietly(under_way)
                raise
            return self._coordinator.restoring.finish(outcome, span)

    async def load(
        self, step: int | None = None, *, include: str | Iterable[str] | None = None, mmap: bool = False
    ) -> dict[str, Any]:
        """Return a checkpoint as a fresh nested dict; see ``aiockpt.load``."""
        return await _wait(self._coordinator.read(lambda r: r.load(step, include=include, mmap=mmap)))

    async def steps(self) -> list[int]:
        """Return the committed steps, ascending."""
        return await _wait(self._coordinator.read(lambda r: r.steps()))

    async def latest(self) -> int | None:
        """Return the step that ``restore`` would try first; None where there is none."""
        return await _wait(self._coordinator.read(lambda r: r.latest()))

    async def verify(self, step: int) -> int:
        """Read a checkpoint whole and compare every checksum.

        Returns:
            The bytes that were read.

        Raises:
            CheckpointCorruptError: Names file, offset and both checksums.
        """
        return await _wait(self._coordinator.read(lambda r: r.verify(step)))


async def _in_thread(call: Any) -> Any:
    return await anyio.to_thread.run_sync(call)


async def load(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    include: str | Iterable[str] | None = None,
    mmap: bool = False,
) -> dict[str, Any]:
    """Return a checkpoint as a fresh nested dict, without a writer: also beside a running job.

    Args:
        path: A run, or one step of it.
        step: None is the newest good one.
        include: Globs over dotted names.
        mmap: Map the files instead of reading them; headers are checked, blocks are not.

    Raises:
        StepNotFoundError: There is none.
        CheckpointCorruptError: It is damaged.
    """
    return cast("dict[str, Any]", await _in_thread(lambda: reading.load(path, step=step, include=include, mmap=mmap)))


async def restore(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    step: int | None = None,
    strict: bool = True,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> Restored | None:
    """Restore into the live objects of ``state`` without a writer; see ``Checkpointer.restore``.

    Each process reads for itself: in a job of several ranks give ``step``, so that all take the same one. What each
    rank has saved of its own is taken from its rank in torch's default process group, from rank 0 where there is none.
    """
    targets = reading.begin(state, include=include, exclude=exclude)
    outcome = await _in_thread(lambda: reading.read(path, targets, step=step, strict=strict))
    return reading.finish(outcome)


async def steps(run: str | os.PathLike[str]) -> list[int]:
    """Return the committed steps of a run, ascending, without a writer."""
    return cast("list[int]", await _in_thread(lambda: reading.steps(run)))
