"""The order of a run: who is measured when, beside whom.

Our default case runs in one process for the whole run. Every other entrant comes once, in a process of its own, and
takes turns with ours and with the floor, round by round, so that a slow minute of the disk is everybody's. Memory and
descriptors are sampled in a round that is not timed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.entrant import OURS, RESTORES, SAVES, Key
from bench.floor_process import FloorProcess
from bench.machine import drop_page_cache
from bench.memory import PeakSampler
from bench.process import EntrantFailedError, EntrantProcess
from bench.results import Floors, Measured

__all__ = ["Outcome", "Plan", "run"]

_FLOORS = {"save": ("write", "memcpy"), "restore": ("read",)}
"""With what each question is compared."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    question: str
    state: str
    size: int
    rounds: int
    warmup: int
    directory: Path
    peers: tuple[str, ...] | None
    """Names of the systems beside ours; None is all."""

    def entrants(self) -> dict[Key, str]:
        """Return those that take part, ours first."""
        everybody = SAVES if self.question == "save" else RESTORES
        return {
            key: place
            for key, place in everybody.items()
            if key.system == OURS.system or self.peers is None or key.system in self.peers
        }


@dataclass
class Outcome:
    """What came out."""

    floors: Floors
    measured: list[Measured]
    skipped: list[dict[str, str]]
    notes: list[str]


class _Entered:
    """An entrant whose process is up."""

    def __init__(self, key: Key, process: EntrantProcess, plan: Plan, notes: list[str]) -> None:
        self.process, self._plan, self._notes = process, plan, notes
        opened = process.answer()
        nbytes, descriptors = int(opened.pop("nbytes")), int(opened.pop("descriptors"))
        self.measured = Measured(key, nbytes, descriptors, opened)
        for _ in range(plan.warmup):
            self.round(timed=False)

    def round(self, *, timed: bool = True) -> None:
        """Measure once."""
        if self._plan.question == "restore":
            why = drop_page_cache()
            if why is not None and why not in self._notes:
                self._notes.append(why)
        else:
            os.sync()  # what others left unwritten is not for this one to wait for
        times = self.process.ask("round")
        if timed:
            self.measured.times.append(times)
        if self._plan.question == "save":
            self.process.ask("discard")

    def weigh(self) -> None:
        """Look at memory and descriptors during one more round."""
        with PeakSampler(self.process.pid) as peak:
            self.round(timed=False)
        self.measured.peak_pss_bytes, self.measured.peak_fds = peak.peak_pss_bytes, peak.peak_fds
        self.measured.child_bytes = peak.peak_child_bytes or None


def run(plan: Plan, say: Callable[[str], None]) -> Outcome:
    """Measure everything that the plan names; ``say`` is told what is going on."""
    entrants = plan.entrants()
    ours, place = next(iter(entrants.items()))
    outcome = Outcome(Floors(), [], [], [])
    with tempfile.TemporaryDirectory(prefix="aiockpt-bench-", dir=plan.directory) as scratch:
        directory = Path(scratch)
        say("floors")
        with (
            FloorProcess(plan.size, directory) as floor,
            _process(place, plan, _folder(directory, ours)) as process,
        ):
            outcome.floors.samples = floor.choose(plan.rounds)
            outcome.floors.threads = floor.threads
            resident = _Entered(ours, process, plan, outcome.notes)
            outcome.measured.append(resident.measured)
            turns = _Turns(plan, floor, resident, outcome)
            for key, place in list(entrants.items())[1:]:
                say(f"{key.system}, {key.case}")
                failure = turns.take(key, place, _folder(directory, key))
                if failure is not None:
                    outcome.skipped.append({"system": key.system, "case": key.case, "why": str(failure)})
            while len(resident.measured.times) < plan.rounds:  # nobody else took part
                turns.one(resident)
            resident.weigh()
            process.close()
    return outcome


class _Turns:
    """A guest, ours and the floor, one after the other."""

    def __init__(self, plan: Plan, floor: FloorProcess, ours: _Entered, outcome: Outcome) -> None:
        self._plan, self._floor, self._ours, self._outcome = plan, floor, ours, outcome

    def take(self, key: Key, place: str, own: Path) -> EntrantFailedError | None:
        """Measure one guest; return what ended that early."""
        try:
            with _process(place, self._plan, own) as process:
                guest = _Entered(key, process, self._plan, self._outcome.notes)
                for _ in range(self._plan.rounds):
                    self.one(guest, self._ours)
                guest.weigh()
                process.close()
                self._outcome.measured.append(guest.measured)
        except EntrantFailedError as exc:
            return exc
        finally:
            shutil.rmtree(own, ignore_errors=True)
        return None

    def one(self, *entered: _Entered) -> None:
        """Measure each of these once, and the floors that they are compared with."""
        for entrant in entered:
            entrant.round()
        sample = self._floor.sample(_FLOORS[self._plan.question])
        self._outcome.floors.add(sample)
        for entrant in entered:
            entrant.measured.floors.add(sample)


def _folder(directory: Path, key: Key) -> Path:
    # Plain names: torch makes URLs of paths and does not take spaces in them.
    own = directory / "".join(letter if letter.isalnum() else "-" for letter in f"{key.system}-{key.case}")
    own.mkdir()
    return own


def _process(place: str, plan: Plan, directory: Path) -> EntrantProcess:
    return EntrantProcess(place, question=plan.question, state=plan.state, size=plan.size, directory=directory)
