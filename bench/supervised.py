"""Groups of processes under one supervisor, looked at from outside: by the kernel's clocks and ``/proc`` alone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from bench.entrants import Entry
from bench.memory import open_fds, tree_of
from bench.process import EntrantFailedError, EntrantProcess

__all__ = ["Group", "Held", "Supervisor"]

_PATIENCE_SECONDS = 150.0
"""For a group to be there: 64 processes that import torch take a minute on two cores."""
_CONSOLE_NBYTES = 1 << 20
_F_SETPIPE_SZ = 1031
_RELEASE_SECONDS = 0.1


class Held(NamedTuple):
    """What supervising takes beyond the supervisor's process without a group."""

    threads: int
    fds: int


class Supervisor:
    """One supervisor in a process of its own; a context manager that leaves none of its groups behind.

    Args:
        entry: Which one.
        directory: For named pipes and logs; must be there.
    """

    def __init__(self, entry: Entry, directory: Path) -> None:
        self._directory = directory
        self._runs = 0
        self._door_path, self._gate_path, console = (directory / name for name in ("door", "gate", "console"))
        for path in (self._door_path, self._gate_path, console):
            os.mkfifo(path)
        with contextlib.ExitStack() as stack:
            stack.callback(self._let_go)
            # Open for both ways, so that neither waits for the other side, nor ends with it.
            self._door, self.console = (os.open(path, os.O_RDWR | os.O_NONBLOCK) for path in (self._door_path, console))
            stack.callback(os.close, self._door)
            stack.callback(os.close, self.console)
            fcntl.fcntl(self.console, _F_SETPIPE_SZ, _CONSOLE_NBYTES)
            given = {"place": entry.place, "console": console}
            self.process = stack.enter_context(EntrantProcess(given, module="bench.supervisor_process"))
            self._held = stack.pop_all()

    def __enter__(self) -> Self:
        try:
            self.process.answer()
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._held.close()

    @contextlib.contextmanager
    def group(self, what: str, children: int, *, tee: bool = False, lines: int = 0) -> Iterator[Group]:
        """Start a group, and bring it to its end behind the block.

        Args:
            what: A kind of ``bench.trainees``.
            children: Their number.
            tee: Whether stdout goes to file and console.
            lines: How many each prints once the gate is open, where that is its kind.

        Raises:
            EntrantFailedError: It was not there in time, or the supervisor failed.
        """
        self._runs += 1
        log_dir = self._directory / f"logs-{self._runs}"
        log_dir.mkdir()
        job = {"what": what, "children": children, "door": str(self._door_path), "gate": str(self._gate_path)}
        self.process.tell(json.dumps({**job, "lines": lines, "tee": tee, "log_dir": str(log_dir)}))
        group = Group(self, children, log_dir, *self._await_all(children))
        try:
            yield group
            group.end()
        finally:
            group.close()

    def open_gate(self) -> int:
        """Let all pass that wait at the gate, now or later, until the descriptor that is returned is closed."""
        return os.open(self._gate_path, os.O_RDWR | os.O_NONBLOCK)

    def _await_all(self, children: int) -> tuple[int, dict[str, Any]]:
        """Return when the last child has said that it is there, and what the supervisor says."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        said, begun = 0, None
        while said < children:
            heard = [self._door] if begun else [self._door, self.process]
            ready, _, _ = select.select(heard, [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise EntrantFailedError(f"{said} of {children} children were there in {_PATIENCE_SECONDS:.0f} s")
            if self._door in ready:
                said += os.read(self._door, 65536).count(b"\n")
            elif begun is None:
                begun = self.process.answer()
        there_ns = time.monotonic_ns()
        return there_ns, begun or self.process.answer()

    def _let_go(self) -> None:
        """Let those pass that a supervisor has left behind at the gate."""
        gate = self.open_gate()
        time.sleep(_RELEASE_SECONDS)
        os.close(gate)


class Group:
    """A group that is there, each process waiting at the gate.

    Attributes:
        log_dir: What it logs lies below.
        pids: Of the children, by rank.
        start_s: From the call until the last one was there, in seconds.
    """

    def __init__(
        self, supervisor: Supervisor, children: int, log_dir: Path, there_ns: int, begun: dict[str, Any]
    ) -> None:
        self._supervisor, self._children, self._begun = supervisor, children, begun
        self.pids = [int(pid) for pid in begun["pids"].values()]
        self._end: dict[str, Any] | None = None
        self._gate: int | None = None
        self.log_dir = log_dir
        self.start_s = (there_ns - begun["called_ns"]) / 1e9

    def look(self) -> Held:
        """Return the threads and descriptors that supervising takes: of all processes but the supervised ones."""
        pids = self._supervising()
        threads = sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids)
        return Held(threads - self._begun["threads"], sum(map(open_fds, pids)) - self._begun["fds"])

    def idle(self, seconds: float) -> float:
        """Return the processor time that supervising takes meanwhile, in seconds per second."""
        pids = self._supervising()
        before, began = sum(map(_processor_ns, pids)), time.monotonic_ns()
        time.sleep(seconds)
        after, ended = sum(map(_processor_ns, pids)), time.monotonic_ns()
        return (after - before) / (ended - began)

    def kill_one(self, after: float) -> dict[str, float]:
        """Kill the last child ``after`` seconds from now; return what it took until that was known and waited for."""
        time.sleep(after)
        killed_ns = time.monotonic_ns()
        os.kill(self.pids[-1], signal.SIGKILL)
        end = self._end = self._supervisor.process.answer()
        if not end["failed"]:
            raise EntrantFailedError("the death of a child is no failure to it")
        returned = (end["returned_ns"] - killed_ns) / 1e9
        known_ns = end["known_ns"]
        return {
            "death_noticed_s": returned,
            "death_known_s": returned if known_ns is None else (known_ns - killed_ns) / 1e9,
        }

    def open_gate(self) -> int:
        """Let all go on, and return when that was, on the monotonic clock in nanoseconds."""
        opened_ns = time.monotonic_ns()
        self._gate = self._supervisor.open_gate()
        return opened_ns

    def end(self) -> dict[str, Any]:
        """Let all end, wait for it, and return what the supervisor says; idempotent."""
        if self._end is None:
            if self._gate is None:
                self.open_gate()
            self._end = self._supervisor.process.answer()
            if self._end["failed"]:
                raise EntrantFailedError(f"{self._end['failed']} of its children failed")
        return self._end

    def close(self) -> None:
        """Close the gate; idempotent."""
        gate, self._gate = self._gate, None
        if gate is not None:
            os.close(gate)

    def _supervising(self) -> list[int]:
        """Return the supervisor and its helpers."""
        supervised = {pid for child in self.pids for pid in tree_of(child)}
        return [pid for pid in tree_of(self._supervisor.process.pid) if pid not in supervised]


def _processor_ns(pid: int) -> int:
    """Return the processor time of all threads of a process, ended ones too, from the kernel's clock for it."""
    return time.clock_gettime_ns((~pid << 3) | 2)
