"""Programs as something to launch."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Command", "Entry", "Programs"]

_FATAL = "Fatal Python error"
"""Begins what faulthandler writes."""


@dataclass(frozen=True)
class Command:
    """What one process executes, and the descriptors it inherits, by the name of the variable that tells it which."""

    executable: str
    argv: Sequence[str]
    inherited: Mapping[str, int] = field(default_factory=dict)


class Entry(Protocol):
    """What the processes of a group run. Ranks are local ones."""

    owes_value: bool
    """Whether a process that ends well must have sent a value."""

    def open(self) -> None:
        """Take what is needed from the operating system."""

    def command(self, rank: int) -> Command:
        """Return what a process executes."""

    def release(self, rank: int) -> None:
        """Let go of what was the process's; it is launched."""

    async def talk(self, rank: int) -> None:
        """Exchange with the process what there is to exchange, until it has hung up."""

    def settle(self, rank: int) -> bool:
        """Take in what a process that has ended had sent; return whether its value is there."""

    def value(self, rank: int) -> Any:
        """Return the value of a process that succeeded; raises whatever keeps it from being read."""

    def stacks_signal(self, pid: int) -> signal.Signals | int | None:
        """Return the signal that asks a process for the stacks of its threads; None where none does."""

    def stacks(self, rank: int, output_tail: str) -> str:
        """Return the stacks that a process wrote."""

    def close(self) -> None:
        """Let go of everything."""


class Programs:
    """One program, with arguments by rank."""

    owes_value = False

    def __init__(self, executables: Mapping[int, str], program: str, args: Mapping[int, Sequence[Any]]) -> None:
        self._executables = executables
        self._argv = {rank: [program, *map(str, own)] for rank, own in args.items()}

    def open(self) -> None:
        """There is nothing to open."""

    def command(self, rank: int) -> Command:
        """Return the program and its arguments."""
        return Command(self._executables[rank], self._argv[rank])

    def release(self, rank: int) -> None:
        """There is nothing to release."""

    async def talk(self, rank: int) -> None:
        """There is nothing to say."""

    def settle(self, rank: int) -> bool:
        """Return that there is no value."""
        return False

    def value(self, rank: int) -> None:
        """Return None: a program has no value but its exit code."""

    def stacks_signal(self, pid: int) -> signal.Signals | None:
        """Return SIGABRT for a process that catches it, as Python with faulthandler does: it writes stacks, then ends.

        A program that does not would only leave a core dump.
        """
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return None
        caught = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")
        return signal.SIGABRT if int(caught.split()[1], 16) >> (signal.SIGABRT - 1) & 1 else None

    def stacks(self, rank: int, output_tail: str) -> str:
        """Return what faulthandler wrote at the end of its output."""
        _, found, stacks = output_tail.rpartition(_FATAL)
        return found + stacks if found else ""

    def close(self) -> None:
        """There is nothing to close."""
