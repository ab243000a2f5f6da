"""Jobs of several ranks: real processes, a real gloo group, and a script that all of them run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support import PATIENCE_SECONDS, ROOT

__all__ = ["Job", "Nursery"]


class Nursery:
    """The process that forks ranks; see ``nursery.py``."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ranks.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self._ended = threading.Condition()
        self._statuses: dict[int, int] = {}
        self._started: list[list[int]] = []
        self._reader = threading.Thread(target=self._read, name="nursery", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            with self._ended:
                if "pids" in answer:
                    self._started.append(answer["pids"])
                else:
                    self._statuses[answer["pid"]] = answer["status"]
                self._ended.notify_all()

    def start(self, world: int, code: str, args: Sequence[Any], directory: Path) -> list[int]:
        """Fork ``world`` ranks that run ``code``; returns their pids."""
        assert self._process.stdin is not None
        job = {"world": world, "code": textwrap.dedent(code), "args": [*args], "directory": str(directory)}
        self._process.stdin.write(json.dumps(job, default=str).encode() + b"\n")
        self._process.stdin.flush()
        with self._ended:
            if not self._ended.wait_for(lambda: self._started, PATIENCE_SECONDS):
                raise AssertionError("the nursery does not answer")
            return self._started.pop(0)

    def status(self, pid: int, timeout: float) -> int | None:
        """Wait for a rank's end; its exit status, negative for a signal, or None where it still runs."""
        with self._ended:
            self._ended.wait_for(lambda: pid in self._statuses, timeout)
            return self._statuses.get(pid)

    def close(self) -> None:
        """Kill what runs, and end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE_SECONDS)
        self._reader.join(PATIENCE_SECONDS)
        self._process.stdout.close()


class Job:
    """One job: the same code on every rank.

    Args:
        nursery: Forks the ranks.
        directory: For the ranks' output; fresh.
        world: How many ranks.
        code: Python; it finds ``rank``, ``world``, ``args``, ``torch``, ``dist`` and ``aiockpt``, and an initialised
            gloo group.
        args: JSON values for ``args``; paths become text.
    """

    def __init__(self, nursery: Nursery, directory: Path, world: int, code: str, *args: Any) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._nursery = nursery
        self._directory = directory
        self.pids = nursery.start(world, code, args, directory)

    def out(self, rank: int) -> list[str]:
        """Lines that a rank has printed so far."""
        return self._text(rank, "out").splitlines()

    def told(self) -> dict[str, list[Any]]:
        """Return what ranks said with ``at_rank.say``: by scenario, by rank; None from who said nothing of it."""
        found: dict[str, list[Any]] = {}
        for rank in range(len(self.pids)):
            for line in self.out(rank):
                scenario, what = json.loads(line)
                found.setdefault(scenario, [None] * len(self.pids))[rank] = what
        return found

    def err(self, rank: int) -> str:
        """What a rank has written to its standard error so far."""
        return self._text(rank, "err")

    def _text(self, rank: int, name: str) -> str:
        path = self._directory / f"{rank}.{name}"
        return path.read_text() if path.exists() else ""

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a rank."""
        os.kill(self.pids[rank], number)

    def wait(self, timeout: float = PATIENCE_SECONDS) -> list[int]:
        """Wait for the end of all ranks; returns their exit statuses."""
        statuses = [self._nursery.status(pid, timeout) for pid in self.pids]
        if None in statuses:
            self.end()
            raise AssertionError(f"ranks hung: {statuses}\n{self.report()}")
        return [status for status in statuses if status is not None]

    def end(self) -> None:
        """Kill the ranks that still run."""
        for pid in self.pids:
            if self._nursery.status(pid, 0) is None:
                with contextlib.suppress(ProcessLookupError):  # it ends by itself just now
                    os.kill(pid, signal.SIGCONT)
                    os.kill(pid, signal.SIGKILL)
                self._nursery.status(pid, PATIENCE_SECONDS)

    def report(self) -> str:
        """Everything that the ranks have said."""
        ranks = range(len(self.pids))
        return "\n".join(f"--- rank {rank}\n{self._text(rank, 'out')}{self.err(rank)}" for rank in ranks)

    def check(self, timeout: float = PATIENCE_SECONDS) -> None:
        """Wait for the end of all ranks, and see that each succeeded."""
        statuses = self.wait(timeout)
        assert not any(statuses), f"{statuses}\n{self.report()}"
