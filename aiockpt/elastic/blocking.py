"""The same names for programs without an event loop: it runs in a thread of its own."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import anyio.from_thread

from aiockpt.elastic import start
from aiockpt.elastic.context import PContext as AsyncContext
from aiockpt.elastic.numa import NumaOptions
from aiockpt.elastic.printing.logs import LogsSpecs
from aiockpt.elastic.results import ProcessStatistics, RunProcsResult
from aiockpt.elastic.signals import SignalScope, signals_to_handle
from aiockpt.elastic.stopping import DEFAULT_STOP_SECONDS

__all__ = ["MultiprocessContext", "PContext", "SubprocessContext", "start_processes"]


class PContext:
    """N processes under one guardian; a context manager. See ``aiockpt.elastic.PContext``.

    Signals are handled in the thread that enters it, so that is to be the main thread.
    """

    def __init__(self, context: AsyncContext, signals: SignalScope) -> None:
        self._context, self._signals = context, signals
        self._held = contextlib.ExitStack()
        self.name, self.nprocs, self.entrypoint = context.name, context.nprocs, context.entrypoint
        self.start_method = context.start_method

    @property
    def stdouts(self) -> Mapping[int, str]:
        """See ``aiockpt.elastic.PContext.stdouts``."""
        return self._context.stdouts

    @property
    def stderrs(self) -> Mapping[int, str]:
        """See ``aiockpt.elastic.PContext.stderrs``."""
        return self._context.stderrs

    @property
    def error_files(self) -> Mapping[int, str]:
        """See ``aiockpt.elastic.PContext.error_files``."""
        return self._context.error_files

    def pids(self) -> dict[int, int]:
        """See ``aiockpt.elastic.PContext.pids``."""
        return self._context.pids()

    def statistics(self) -> ProcessStatistics:
        """See ``aiockpt.elastic.PContext.statistics``."""
        return self._context.statistics()

    def __enter__(self) -> Self:
        """Start all processes, or none; see ``aiockpt.elastic.PContext``."""
        with contextlib.ExitStack() as held:
            self._signals.install()
            held.callback(self._signals.restore)
            self._portal = held.enter_context(
                anyio.from_thread.start_blocking_portal("asyncio", backend_options={"use_uvloop": True})
            )
            held.enter_context(self._portal.wrap_async_context_manager(self._context))
            self._held = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held.__exit__(kind, error, traceback)

    def wait(self, timeout: float | None = None) -> RunProcsResult | None:
        """Wait for the result; see ``aiockpt.elastic.PContext.wait``."""
        return self._portal.call(self._context.wait, timeout)

    def close(self, death_sig: signal.Signals | None = None, timeout: float | None = None) -> None:
        """Stop what runs, and let go of everything; see ``aiockpt.elastic.PContext.close``."""
        self._portal.call(self._context.close, death_sig, timeout)


class MultiprocessContext(PContext):
    """Processes that run a function."""


class SubprocessContext(PContext):
    """Processes that run a program."""


def start_processes(
    name: str,
    entrypoint: str | Callable[..., Any],
    args: Mapping[int, tuple[Any, ...]],
    envs: Mapping[int, Mapping[str, str]],
    logs_specs: LogsSpecs | None = None,
    log_line_prefixes: Mapping[int, str] | None = None,
    start_method: str = "spawn",
    numa_options: NumaOptions | None = None,
    duplicate_stdout_filters: Sequence[str] | None = None,
    duplicate_stderr_filters: Sequence[str] | None = None,
    *,
    stop_timeout: float = DEFAULT_STOP_SECONDS,
) -> MultiprocessContext | SubprocessContext:
    """Return a context that runs one process for each local rank; see ``aiockpt.elastic.start_processes``."""
    signals = SignalScope(signals_to_handle(os.environ))
    context = start.start_processes(
        name,
        entrypoint,
        args,
        envs,
        logs_specs,
        log_line_prefixes,
        start_method,
        numa_options,
        duplicate_stdout_filters,
        duplicate_stderr_filters,
        stop_timeout=stop_timeout,
        signals=signals,
    )
    kind = SubprocessContext if isinstance(entrypoint, str) else MultiprocessContext
    return kind(context, signals)
