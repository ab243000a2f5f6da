"""What came of a group whose processes have all ended: values, and failures with their causes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from aiockpt.elastic.failures.error_data import NOT_AVAILABLE
from aiockpt.elastic.failures.process_failure import Cause, ProcessFailure
from aiockpt.elastic.failures.unreaped import Unreaped
from aiockpt.elastic.group import End, Group
from aiockpt.elastic.launching.programs import Entry
from aiockpt.elastic.printing.logs import LogsDest
from aiockpt.elastic.results import RunProcsResult

__all__ = ["judge"]


def judge(
    group: Group,
    entry: Entry,
    logs: LogsDest,
    *,
    private_error_file: Callable[[int], str],
    output_tail: Callable[[int], str],
    oom_kills: int,
    unreaped: tuple[Unreaped, ...],
) -> RunProcsResult:
    """Return the result; reads error files and values, so call it in a thread.

    Args:
        group: All have ended.
        entry: What they ran; it has the values, and the stacks.
        logs: Where output and errors went.
        private_error_file: Where a rank's error is that has no file in the logs.
        output_tail: The last lines of a rank's output.
        oom_kills: How often the kernel has killed for want of memory in our control group since the start.
        unreaped: Processes that the kernel could not end.
    """

    def failure(end: End, cause: Cause, tail: str, stacks: str) -> ProcessFailure:
        in_logs = logs.error_files[end.rank]
        made = ProcessFailure(
            end.rank,
            end.pid,
            end.exitcode,
            in_logs or private_error_file(end.rank),
            cause=cause,
            detected_ns=end.detected_ns,
            order=end.order,
            sent_signal=end.sent_signal,
            sent_ns=end.sent_ns,
            output_tail=tail,
            stacks=stacks,
        )
        if not in_logs:
            made.error_file = NOT_AVAILABLE  # it goes with the guardian
        return made

    values: dict[int, Any] = {}
    failures: dict[int, ProcessFailure] = {}
    for rank, end in sorted(group.ends.items()):
        tail = output_tail(rank)
        if end.cause is not None:
            cause = end.cause
            if oom_kills and end.exitcode == -signal.SIGKILL and cause is Cause.OWN:
                cause = Cause.OUT_OF_MEMORY
            failures[rank] = failure(end, cause, tail, entry.stacks(rank, tail))
            continue
        try:
            values[rank] = entry.value(rank)
        except Exception as exc:  # noqa: BLE001 - whatever a user's class raises when it is made again
            text = f"its value cannot be read here: {type(exc).__name__}: {exc}\n{tail}"
            failures[rank] = failure(end, Cause.NO_RESULT, text, "")
    return RunProcsResult(values, failures, logs.stdouts, logs.stderrs, unreaped)
