"""The order of a run: who is measured when, beside whom.

Our default case runs in one process for the whole run. Every other entrant comes once, in a process of its own, and
takes turns with ours and with the floors, round by round, so that a slow minute of the disk is everybody's. Memory and
descriptors are sampled in a round that is not timed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bench.entrants import Entry, Key
from bench.floor_process import FloorProcess
from bench.machine import drop_page_cache
from bench.memory import PeakSampler
from bench.process import Entrant, EntrantFailedError, EntrantProcess
from bench.results import Floors, Measured, Round

__all__ = ["Entered", "Outcome", "Plan", "RestoreTurns", "SaveTurns", "Turns", "folder", "run", "skip", "start"]

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure."""

    entries: Mapping[Key, Entry]
    """Ours first."""
    size: int
    rounds: int
    warmup: int
    directory: Path
    tensor_nbytes: int = 4096
    nofile: int | None = None
    """Descriptors that each system may have open; None is what this process may."""
    launch: Callable[[Entry, str, Plan, Path], Entrant] | None = None
    """Starts an entrant for (entry, role, plan, directory); None is one process each."""


@dataclass
class Outcome:
    """What came out."""

    floors: Floors
    measured: list[Measured]
    skipped: list[dict[str, str]]
    notes: list[str]


class Entered:
    """An entrant whose process is up."""

    def __init__(self, key: Key, process: Entrant) -> None:
        self.process = process
        self.measured = Measured(key, process.answer())
        self.path = Path(self.measured.opened.get("path", "."))
        """Of the checkpoint that it restores."""
        self.threads = 1
        """With how many this is read fastest."""

    def weigh(self, work: Callable[[], object]) -> None:
        """Look at memory and descriptors while ``work`` runs."""
        with PeakSampler(self.process.pid) as peak:
            work()
        self.measured.peak_pss_bytes, self.measured.peak_fds = peak.peak_pss_bytes, peak.peak_fds
        self.measured.child_bytes = peak.peak_child_bytes or None


class Turns(ABC):
    """How one question is asked: what a round is, and which floors are measured beside it."""

    ROLE: ClassVar[str]
    """Of the process, as ``bench.child`` names it."""

    def __init__(self, floor: FloorProcess, notes: list[str]) -> None:
        self._floor = floor
        self._notes = notes

    @abstractmethod
    def get_ready(self, entered: Entered) -> None:
        """Do what comes once, before all rounds."""

    @abstractmethod
    def round(self, entered: Entered) -> dict[str, float]:
        """Ask once, and leave things as they were; returns the times."""

    @abstractmethod
    def together(self, *entered: Entered) -> dict[str, float]:
        """Measure each once, with the floors; returns those that are the machine's and not one entrant's."""


class SaveTurns(Turns):
    """Saves, with the machine's floors behind them."""

    ROLE = "save"

    def get_ready(self, entered: Entered) -> None:
        """Nothing."""

    def round(self, entered: Entered) -> dict[str, float]:
        """Save and remove."""
        os.sync()  # what others left unwritten is not for this one to wait for
        times = entered.process.ask("round")
        entered.process.ask("discard")
        return times

    def together(self, *entered: Entered) -> dict[str, float]:
        """Save each, then measure the floors, which are everybody's."""
        times = [self.round(entrant) for entrant in entered]
        floors = self._floor.sample(("write", "memcpy"))
        for entrant, its in zip(entered, times, strict=True):
            entrant.measured.rounds.append(Round(its, floors))
        return floors


class RestoreTurns(Turns):
    """Restores, each with the floor of its own files: a disk reads equal files at different speeds."""

    ROLE = "restore"

    def get_ready(self, entered: Entered) -> None:
        """Find out with how many threads these files are read fastest."""
        entered.threads = self._floor.choose_reading(entered.path, self._forget)

    def round(self, entered: Entered) -> dict[str, float]:
        """Restore from a cold cache."""
        self._forget()
        return entered.process.ask("round")

    def together(self, *entered: Entered) -> dict[str, float]:
        """Restore each and read its files, in alternating order: the second may find the disk's own cache warm."""
        for entrant in entered:
            if len(entrant.measured.rounds) % 2:
                rate, times = self._read(entrant), self.round(entrant)
            else:
                times, rate = self.round(entrant), self._read(entrant)
            entrant.measured.rounds.append(Round(times, {"read": rate}))
        return {}

    def _read(self, entered: Entered) -> float:
        self._forget()
        return self._floor.reading(entered.path, entered.threads)

    def _forget(self) -> None:
        why = drop_page_cache()
        if why is not None and why not in self._notes:
            self._notes.append(why)


def run(plan: Plan, turns_of: type[Turns], say: Say) -> Outcome:
    """Measure everything that the plan names; ``say`` is told what is going on.

    Raises:
        EntrantFailedError: Ours failed.
    """
    (ours, entry), *others = plan.entries.items()
    outcome = Outcome(Floors(), [], [], [])
    with tempfile.TemporaryDirectory(prefix="aiockpt-bench-", dir=plan.directory) as scratch:
        directory = Path(scratch)
        say("floors")
        with (
            FloorProcess(plan.size, directory) as floor,
            start(entry, turns_of.ROLE, plan, folder(directory, ours)) as process,
        ):
            outcome.floors.samples = floor.choose(plan.rounds)
            outcome.floors.threads = floor.threads
            course = _Course(plan, turns_of(floor, outcome.notes), outcome)
            resident = course.enter(ours, process)
            outcome.measured.append(resident.measured)
            for key, other in others:
                say(f"{key.system}, {key.case}")
                course.take(key, other, folder(directory, key), resident)
            while len(resident.measured.rounds) < plan.rounds:  # nobody else took part
                course.measure(resident)
            resident.weigh(lambda: course.turns.round(resident))
            process.close()
    return outcome


class _Course:
    """Guests beside ours, one after the other."""

    def __init__(self, plan: Plan, turns: Turns, outcome: Outcome) -> None:
        self.turns = turns
        self._plan = plan
        self._outcome = outcome

    def enter(self, key: Key, process: Entrant) -> Entered:
        """Wait for an entrant, and warm it up."""
        entered = Entered(key, process)
        self.turns.get_ready(entered)
        for _ in range(self._plan.warmup):
            self.turns.round(entered)
        return entered

    def take(self, key: Key, entry: Entry, own: Path, ours: Entered) -> None:
        """Measure one guest, or note what ended that early."""
        try:
            with start(entry, self.turns.ROLE, self._plan, own) as process:
                guest = self.enter(key, process)
                for _ in range(self._plan.rounds):
                    self.measure(guest, ours)
                guest.weigh(lambda: self.turns.round(guest))
                process.close()
                self._outcome.measured.append(guest.measured)
        except EntrantFailedError as exc:
            self._outcome.skipped.append(skip(key, exc))
        finally:
            shutil.rmtree(own, ignore_errors=True)

    def measure(self, *entered: Entered) -> None:
        """Measure each of these once, and the floors that they are compared with."""
        self._outcome.floors.add(self.turns.together(*entered))


def start(entry: Entry, role: str, plan: Plan, directory: Path) -> Entrant:
    """Start the process of an entrant, or the processes."""
    if plan.launch is not None:
        return plan.launch(entry, role, plan, directory)
    return EntrantProcess(
        {
            "place": entry.place,
            "role": role,
            "state": entry.state,
            "size": plan.size,
            "tensor-nbytes": plan.tensor_nbytes,
            "nofile": plan.nofile,
            "dir": directory,
        }
    )


def skip(key: Key, why: EntrantFailedError) -> dict[str, str]:
    """Return the entry of one that was not measured."""
    return {"system": key.system, "case": key.case, "why": str(why)}


def folder(directory: Path, key: Key) -> Path:
    """Make a directory for an entrant."""
    # Plain names: torch makes URLs of paths and does not take spaces in them.
    own = directory / "".join(letter if letter.isalnum() else "-" for letter in f"{key.system}-{key.case}")
    own.mkdir()
    return own
