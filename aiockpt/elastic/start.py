"""Start a group of processes: all that can be wrong with what is asked for is found before anything is touched."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aiockpt.elastic.context import MultiprocessContext, SubprocessContext
from aiockpt.elastic.launching.functions import Functions
from aiockpt.elastic.launching.programs import Programs
from aiockpt.elastic.numa import NumaOptions
from aiockpt.elastic.plan import Plan, check_full_rank, environments, find_program
from aiockpt.elastic.printing.logs import DefaultLogsSpecs, LogsSpecs
from aiockpt.elastic.signals import SignalScope
from aiockpt.elastic.stopping import DEFAULT_STOP_SECONDS
from aiockpt.errors import ConfigError

__all__ = ["start_processes"]


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
    signals: SignalScope | None = None,
) -> MultiprocessContext | SubprocessContext:
    """Return a context that runs one process for each local rank; ``async with`` starts them.

    Args:
        name: What they are called, in line prefixes and reports.
        entrypoint: A program (a name for PATH, or a path), or a function of a module. A function runs in a fresh
            interpreter, like with ``multiprocessing``'s "spawn": a script needs its ``if __name__ == "__main__"``.
        args: Arguments by local rank, from 0 on. A program's become strings; a function's must be picklable.
        envs: What is added to this program's environment, by local rank.
        logs_specs: Where output goes; unless said, to the console as it is.
        log_line_prefixes: By local rank, in place of ``[name + rank]:``.
        start_method: ``"spawn"``.
        numa_options: How processes are bound to processors; unless said, not at all.
        duplicate_stdout_filters: Lines of teed stdouts that contain one of these go to one file for all ranks as well.
        duplicate_stderr_filters: The same of stderr.
        stop_timeout: Seconds for a stop, from the death signal until the last process is killed and gone.
        signals: The scope of signal handlers, where the caller has installed one; unless said, one is opened for
            ``TORCHELASTIC_SIGNALS_TO_HANDLE`` from start to end.

    Raises:
        ConfigError: Anything of this cannot be.
    """
    if start_method != "spawn":
        raise ConfigError(
            f"{name} was not started: start_method={start_method!r} is not supported",
            why="a guardian process launches the functions, so there is no process of yours to fork them from",
            next='leave start_method at "spawn"',
        )
    if not isinstance(stop_timeout, (int, float)) or not 0 <= stop_timeout < math.inf:
        raise ConfigError(
            f"{name} was not started: stop_timeout={stop_timeout!r} is not a number of seconds",
            why="a stop without an end would leave processes",
            next="give a finite number of at least 0",
        )
    nprocs = len(args)
    if not nprocs:
        raise ConfigError(f"{name} was not started: there are no local ranks", next="give arguments for at least one")
    check_full_rank("args", args, nprocs)
    check_full_rank("envs", envs, nprocs)
    if log_line_prefixes is not None:
        check_full_rank("log_line_prefixes", log_line_prefixes, nprocs)
    plan = Plan(
        name=name,
        envs=environments(os.environ, envs, args),
        logs_specs=logs_specs or DefaultLogsSpecs(),
        stop_timeout=stop_timeout,
        prefixes=log_line_prefixes,
        numa_options=numa_options,
        stdout_filters=_filters("duplicate_stdout_filters", duplicate_stdout_filters),
        stderr_filters=_filters("duplicate_stderr_filters", duplicate_stderr_filters),
    )
    if isinstance(entrypoint, str):
        found = {rank: find_program(entrypoint, env) for rank, env in plan.envs.items()}
        return SubprocessContext(plan, Programs(found, entrypoint, args), entrypoint, signals=signals)
    return MultiprocessContext(plan, Functions(name, entrypoint, args), entrypoint, signals=signals)


def _filters(what: str, given: Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(given, str) or not all(isinstance(text, str) and text for text in given or ()):
        raise ConfigError(
            f"no process was started: {what}={given!r} is no list of texts",
            why="a line is chosen if it contains one of several texts, none of them empty",
            next='give a list, also of one: ["loss"]',
        )
    return tuple(given or ())
