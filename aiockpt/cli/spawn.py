"""``aiockpt spawn``: trainers on this host, stopped together, and what came of them as a report and an exit status."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NoReturn

import anyio

from aiockpt.elastic.context import PContext
from aiockpt.elastic.failures.process_failure import Cause, ProcessFailure
from aiockpt.elastic.failures.report import format_report, root_cause_of
from aiockpt.elastic.nprocs import nprocs_of
from aiockpt.elastic.numa import AffinityMode, NumaOptions
from aiockpt.elastic.printing.logs import DefaultLogsSpecs
from aiockpt.elastic.printing.std import Std
from aiockpt.elastic.results import RunProcsResult
from aiockpt.elastic.signals import SignalException
from aiockpt.elastic.start import start_processes
from aiockpt.elastic.trainer_env import held_port, substitute_local_rank, trainer_envs
from aiockpt.errors import CheckpointError, ConfigError

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Run the trainers to their end; 0 where all succeeded, else what the root cause ended with.

    A signal stops the trainers, and when they are gone it ends this process as well: this does not return then.
    """
    try:
        result = anyio.run(_supervise, args, backend="asyncio", backend_options={"use_uvloop": True})
    except SignalException as exc:
        if exc.result is not None and any(one.cause is not Cause.STOPPED for one in exc.result.failures.values()):
            print(format_report(args.name, exc.result.failures), file=sys.stderr)  # one had failed before
        _end_by(exc.sigval)
    if not result.is_failed():
        return 0
    print(format_report(args.name, result.failures), file=sys.stderr)
    return _exit_status(root_cause_of(result.failures)[1])


async def _supervise(args: argparse.Namespace) -> RunProcsResult:
    program, *arguments = _command(args.command_line)
    nprocs = nprocs_of(args.nprocs, environ=os.environ)
    redirects, tee = _streams("--redirects", args.redirects), _streams("--tee", args.tee)
    _check_teed(tee, Std.OUT, "--filter-stdout", args.filter_stdout)
    _check_teed(tee, Std.ERR, "--filter-stderr", args.filter_stderr)
    with _free_port() as port:
        context = start_processes(
            args.name,
            program,
            {rank: substitute_local_rank(arguments, rank) for rank in range(nprocs)},
            trainer_envs(
                nprocs,
                environ=os.environ,
                master_port=port,
                run_id=args.run_id or uuid.uuid4().hex,
                role=args.name,
                virtual_local_rank=args.virtual_local_rank,
            ),
            DefaultLogsSpecs(args.log_dir, redirects, tee, args.local_ranks_filter),
            numa_options=NumaOptions(AffinityMode(args.numa_binding)) if args.numa_binding else None,
            duplicate_stdout_filters=args.filter_stdout,
            duplicate_stderr_filters=args.filter_stderr,
            stop_timeout=args.stop_timeout,
        )
        async with context:
            if logs := _log_directory(context):
                print(f"aiockpt: logs in {logs}", file=sys.stderr, flush=True)
            result = await context.wait()
    assert result is not None  # there was no timeout
    return result


def _command(words: Sequence[str]) -> Sequence[str]:
    """Return the program and its arguments, without the dashes that may stand before them."""
    words = words[1:] if words[:1] == ["--"] else words
    if not words:
        raise ConfigError(
            "no process was started: no program is named",
            next='put it behind two dashes, as in "aiockpt spawn -n 2 -- python train.py"',
        )
    return words


def _streams(option: str, text: str) -> Std | dict[int, Std]:
    """Return what an option says of streams."""
    try:
        return Std.from_str(text)
    except ConfigError as exc:
        raise ConfigError(f"no process was started: {option} was refused", why=exc.why, next=exc.next) from exc


def _check_teed(tee: Std | dict[int, Std], stream: Std, option: str, filters: Sequence[str] | None) -> None:
    """Refuse filters that would have no lines to choose from."""
    flags = tee.values() if isinstance(tee, dict) else [tee]
    if filters and not any(stream in flag for flag in flags):
        raise ConfigError(
            f"no process was started: {option} has no lines to choose from",
            why="filters read what is teed, and --tee names this stream of no rank",
            next=f"give --tee {stream.value}, or --tee 3 for both streams",
        )


@contextmanager
def _free_port() -> Iterator[int]:
    """Hold a port for the store of rank 0."""
    with ExitStack() as held:
        try:
            port = held.enter_context(held_port())
        except OSError as exc:
            raise CheckpointError(
                "no process was started: this host has no free port for the store of rank 0",
                why=str(exc),
                next="look at what holds so many sockets (ss -s)",
            ) from exc
        yield port


def _log_directory(context: PContext) -> str:
    """Return where the log files of this start are; empty where it makes none."""
    files = [path for path in (*context.stdouts.values(), *context.stderrs.values()) if path not in ("", os.devnull)]
    return os.path.dirname(os.path.dirname(files[0])) if files else ""


def _exit_status(failure: ProcessFailure) -> int:
    """Return what a shell would say of a child that ended like this."""
    return 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode


def _end_by(signum: signal.Signals) -> NoReturn:
    """End this process as the signal would have: who waits for it sees that it was this one, and no exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signum])
    signal.raise_signal(signum)
    sys.exit(128 + signum)  # of a signal whose default action ends nobody, such as SIGCHLD
