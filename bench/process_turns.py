"""The turns of supervisors: each in a process of its own, all beside each other, with so many children each."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import runner
from bench.entrants import OURS, Entry, Key
from bench.process import EntrantFailedError
from bench.results import spread
from bench.supervised import Supervisor
from bench.teed_lines import tee

__all__ = ["ProcessTurns"]

_SPREADS = ("start_s", "start_torch_s", "death_noticed_s", "death_known_s", "lines_per_s", "idle_cpu_s_per_s")
_COUNTS = ("lines_lost", "threads", "open_fds", "threads_no_tee", "open_fds_no_tee")
"""Of these the greatest is told."""
_PERIOD_SECONDS = 1.0
"""A death comes at another part of the period in each round: who polls finds some early, and some late."""
_IDLE_SECONDS = 1.5
_FEW_FUNCTIONS, _MANY_FUNCTIONS = 4, 16
"""Each imports torch, which takes a processor for a second: more than a few are started in the first round alone, and
more than many only where they need not import it themselves."""


class ProcessTurns(contextlib.ExitStack):
    """What all supervisors do with a number of children; a context manager that ends the supervisors.

    Args:
        children: Their number.
        lines: How many each prints where they print.
        skipped: Gets those that fail.
    """

    def __init__(self, children: int, lines: int, skipped: list[dict[str, str]]) -> None:
        super().__init__()
        self._children, self._lines, self._skipped = children, lines, skipped
        self._supervisors: dict[Key, Supervisor] = {}
        self._samples: dict[tuple[Key, str], defaultdict[str, list[float]]] = {}

    def enter(self, key: Key, entry: Entry, directory: Path) -> None:
        """Start a supervisor, and have it run a group that is not measured: it imports the last of its modules."""

        def start() -> None:
            supervisor = self.enter_context(Supervisor(entry, directory))
            with supervisor.group("programs", self._children):
                pass
            self._supervisors[key] = supervisor

        self._unless_it_fails(key, start)

    def round(self, n: int, *, of: int) -> None:
        """Measure everybody once.

        Args:
            n: Which round this is, from 0 on.
            of: How many there are.

        Raises:
            EntrantFailedError: Ours failed.
        """
        phase = _PERIOD_SECONDS * (n + 0.5) / of
        takes: list[Callable[[Key], None]] = [lambda key: self._programs(key, phase), self._printers]
        if not n or self._children <= _FEW_FUNCTIONS:
            takes.append(lambda key: self._functions(key, phase))
            if self._children <= _MANY_FUNCTIONS:
                takes.append(self._torch_functions)
        for take in takes:
            keys = list(self._supervisors)
            first = n % len(keys)
            for key in keys[first:] + keys[:first]:
                self._unless_it_fails(key, lambda: take(key))  # noqa: B023  # called at once

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each supervisor and kind of children."""
        return [self._row(key, kind, samples) for (key, kind), samples in self._samples.items()]

    def _unless_it_fails(self, key: Key, take: Callable[[], None]) -> None:
        try:
            take()
        except EntrantFailedError as exc:
            if key.system == OURS:
                raise
            self._supervisors.pop(key, None)
            skipped = runner.skip(key, exc)
            self._skipped.append(skipped | {"case": f"{key.case}, {self._children} children"})

    # -- what is measured -----------------------------------------------------------------------------------------

    def _add(self, key: Key, kind: str, **figures: float) -> None:
        samples = self._samples.setdefault((key, kind), defaultdict(list))
        for name, figure in figures.items():
            samples[name].append(figure)

    def _programs(self, key: Key, phase: float) -> None:
        with self._supervisors[key].group("programs", self._children) as group:
            held = group.look()
            self._add(key, "programs", start_s=group.start_s, threads_no_tee=held.threads, open_fds_no_tee=held.fds)
            self._add(key, "programs", **group.kill_one(phase))

    def _printers(self, key: Key) -> None:
        supervisor = self._supervisors[key]
        with supervisor.group("printers", self._children, tee=True, lines=self._lines) as group:
            held = group.look()
            self._add(key, "programs", threads=held.threads, open_fds=held.fds)
            self._add(key, "programs", idle_cpu_s_per_s=group.idle(_IDLE_SECONDS))
            self._add(key, "programs", **tee(supervisor, group, self._children, self._lines))

    def _functions(self, key: Key, phase: float) -> None:
        if self._starts_functions(key):
            with self._supervisors[key].group("functions", self._children, tee=True) as group:
                held = group.look()
                self._add(key, "functions", start_s=group.start_s, threads=held.threads, open_fds=held.fds)
                self._add(key, "functions", **group.kill_one(phase))

    def _torch_functions(self, key: Key) -> None:
        if self._starts_functions(key):
            with self._supervisors[key].group("torch functions", self._children, tee=True) as group:
                self._add(key, "functions", start_torch_s=group.start_s)

    def _starts_functions(self, key: Key) -> bool:
        """Return whether it is the first of its system: they take long, and the others differ in waiting alone."""
        return key == next(each for each in self._supervisors if each.system == key.system)

    # -- what is told ---------------------------------------------------------------------------------------------

    def _row(self, key: Key, kind: str, samples: Mapping[str, list[float]]) -> dict[str, Any]:
        row = {"system": key.system, "case": ", ".join(filter(None, (kind, key.case))), "children": self._children}
        for name in _SPREADS:
            row |= spread(name, samples.get(name, []))
        for name in _COUNTS:
            row[name] = int(max(samples[name])) if name in samples else None
        return row | {"rounds": len(samples["start_s"])}
