"""What came of a group of processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiockpt.elastic.failures.process_failure import ProcessFailure
from aiockpt.elastic.failures.unreaped import Unreaped
from aiockpt.elastic.printing.output_statistics import OutputStatistics

__all__ = ["ProcessStatistics", "RunProcsResult"]


@dataclass(frozen=True)
class RunProcsResult:
    """Outcome of all processes, by local rank.

    Attributes:
        return_values: Of those that succeeded: what the function returned, None for a program.
        failures: Of those that did not, with the cause of each; those that we stopped are among them.
        stdouts: Path of each one's log; "" where it was not redirected.
        stderrs: The same.
        unreaped: Processes that the kernel could not end; they are left behind.
    """

    return_values: Mapping[int, Any] = field(default_factory=dict)
    failures: Mapping[int, ProcessFailure] = field(default_factory=dict)
    stdouts: Mapping[int, str] = field(default_factory=dict)
    stderrs: Mapping[int, str] = field(default_factory=dict)
    unreaped: tuple[Unreaped, ...] = ()

    def is_failed(self) -> bool:
        """Return whether any process failed."""
        return bool(self.failures)


@dataclass(frozen=True)
class ProcessStatistics:
    """A look at a group of processes.

    Attributes:
        state: ``"new"``, ``"running"``, ``"stopping"`` or ``"ended"``.
        started: Number of processes that were launched.
        ended: Number of those that have ended.
        signals_sent: Names of the signals sent, in order.
        processors: By local rank what each was bound to; None where it was not.
        output: Of the streams that are read here; None before the start.
    """

    state: str
    started: int
    ended: int
    signals_sent: tuple[str, ...]
    processors: Mapping[int, frozenset[int] | None]
    output: OutputStatistics | None
