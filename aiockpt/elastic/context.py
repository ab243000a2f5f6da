"""The face of a group of processes: start, wait, close."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import anyio

from aiockpt.elastic.launching.programs import Entry
from aiockpt.elastic.plan import Plan
from aiockpt.elastic.results import ProcessStatistics, RunProcsResult
from aiockpt.elastic.signals import SignalException, SignalScope, signals_to_handle
from aiockpt.elastic.supervision import Supervision
from aiockpt.errors import UsageError

__all__ = ["MultiprocessContext", "PContext", "SubprocessContext"]


class PContext:
    """N processes under one guardian; an async context manager, made by ``start_processes``.

    Entering starts all of them or raises; leaving guarantees that none is left, nor anything that they started.
    The first failure stops the others at once, whether anybody waits or not, and so does a signal to this program.

    Attributes:
        name: What the processes are called in prefixes and reports.
        entrypoint: The program, or the function.
        nprocs: Their number.
        start_method: ``"spawn"``.
    """

    start_method = "spawn"

    def __init__(
        self, plan: Plan, entry: Entry, entrypoint: str | Callable[..., Any], *, signals: SignalScope | None = None
    ) -> None:
        self.name, self.nprocs, self.entrypoint = plan.name, plan.nprocs, entrypoint
        self._plan, self._entry = plan, entry
        self._signals = signals or SignalScope(signals_to_handle(os.environ))
        self._supervision: Supervision | None = None
        self._signal_is_told = False

    # -- what can be asked ----------------------------------------------------------------------------------------

    @property
    def stdouts(self) -> Mapping[int, str]:
        """Path of each one's log, "" where it is not redirected; known once started."""
        return self._logs("stdouts")

    @property
    def stderrs(self) -> Mapping[int, str]:
        """The same of stderr."""
        return self._logs("stderrs")

    @property
    def error_files(self) -> Mapping[int, str]:
        """Path of the file that each one's error is written to."""
        return self._logs("error_files")

    def pids(self) -> dict[int, int]:
        """Return each process's pid by local rank, also of those that have ended."""
        return dict(sorted(self._supervision.group.pids.items())) if self._supervision else {}

    def statistics(self) -> ProcessStatistics:
        """Return a look at the group."""
        seen = self._supervision
        if seen is None:
            return ProcessStatistics("new", 0, 0, (), {}, None)
        running = "stopping" if seen.is_stopping else "running"
        return ProcessStatistics(
            state="ended" if seen.concluded.is_set() else running,
            started=len(seen.group.pids),
            ended=len(seen.group.ends),
            signals_sent=tuple(seen.group.signals_sent),
            processors=dict(seen.bindings),
            output=seen.output.statistics() if seen.output else None,
        )

    # -- life -----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Start all processes, or none.

        Raises:
            UsageError: It was started before.
            ConfigError: Logs or processors cannot be had as asked for.
            CheckpointError: The operating system refused a process.
            Exception: Whatever ``logs_specs`` raises, where they are the caller's own.
        """
        if self._supervision is not None:
            raise UsageError(f"{self.name} was not started again", next="make another context by start_processes()")
        self._supervision = seen = Supervision(self._plan, self._entry, self._signals)
        async with contextlib.AsyncExitStack() as held:
            if not self._signals.is_installed:
                self._signals.install()
                held.callback(self._signals.restore)
            tasks = anyio.create_task_group()
            await tasks.__aenter__()
            # Not with the error of the block: it is to leave as it is, and not in a group.
            held.push_async_callback(tasks.__aexit__, None, None, None)
            tasks.start_soon(seen.run)
            try:
                await seen.started.wait()
            except BaseException:
                await self.close(timeout=0)
                raise
            if seen.error is not None:
                await seen.ended.wait()
                raise seen.error
            self._held = held.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        async with self._held:
            await self.close()
        if error is None:
            self._raise_signal(again=False)

    async def wait(self, timeout: float | None = None) -> RunProcsResult | None:
        """Wait until all have succeeded, or one has failed and the others are stopped.

        Args:
            timeout: Seconds; 0 only looks, None or a negative number waits for ever.

        Returns:
            The result, the same one at every call; None where the time ran out first.

        Raises:
            SignalException: A signal asked this program to end, and the processes have been stopped with it.

        Cancellation: the processes run on.
        """
        seen = self._supervision
        if seen is None:
            raise UsageError(f"{self.name} was not started", next="use it in an 'async with' block")
        with anyio.move_on_after(timeout if timeout is None or timeout >= 0 else None):
            await seen.concluded.wait()
        if seen.concluded.is_set():
            self._raise_signal()
        return seen.result

    async def close(self, death_sig: signal.Signals | None = None, timeout: float | None = None) -> None:
        """Stop what runs, and let go of everything; harmless at any time, and again.

        Args:
            death_sig: What to stop the processes with; SIGTERM unless said.
            timeout: Seconds from the signal until the last one is killed and gone; unless said, what
                ``start_processes`` was given. A stop that is under way is shortened to it.

        Cancellation: is put off until all have ended, which the timeout bounds.
        """
        if self._supervision is None:
            return
        with anyio.CancelScope(shield=True):
            self._supervision.stop(death_sig or signal.SIGTERM, timeout)
            self._supervision.close()
            await self._supervision.ended.wait()

    def _logs(self, which: str) -> Mapping[int, str]:
        logs = self._supervision.logs if self._supervision else None
        return getattr(logs, which) if logs is not None else {}

    def _raise_signal(self, *, again: bool = True) -> None:
        """Raise the signal that this program received, if it did; with ``again=False`` unless that was told before."""
        seen = self._supervision
        if seen is None or seen.signal is None or (self._signal_is_told and not again):
            return
        self._signal_is_told = True
        text = f"{self.name} was stopped: this program received {seen.signal.name}"
        raise SignalException(text, seen.signal, seen.result)


class MultiprocessContext(PContext):
    """Processes that run a function; ``start_processes`` makes it of a callable."""


class SubprocessContext(PContext):
    """Processes that run a program; ``start_processes`` makes it of a string."""
