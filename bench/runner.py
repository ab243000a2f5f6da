"""The order of a run: who is measured when, beside whom.

Our default case runs in one process for the whole run. Every other entrant comes once, in a process of its own, and
takes turns with ours, round by round, so that a slow minute of the disk is everybody's. Floors are sampled before the
first entrant and after each. Memory and descriptors are sampled in a round that is not timed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.entrant import OURS, RESTORES, SAVES, Key
from bench.machine import drop_page_cache
from bench.memory import PeakSampler
from bench.process import EntrantFailedError, EntrantProcess
from bench.results import Floors, Measured

__all__ = ["Outcome", "Plan", "run"]


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
        outcome.floors.samples.append(_floors(plan, directory))
        with _process(place, plan, _folder(directory, ours)) as process:
            resident = _Entered(ours, process, plan, outcome.notes)
            outcome.measured.append(resident.measured)
            for key, place in list(entrants.items())[1:]:
                say(f"{key.system}, {key.case}")
                failure = _measure(key, place, plan, directory, resident, outcome)
                if failure is not None:
                    outcome.skipped.append({"system": key.system, "case": key.case, "why": str(failure)})
                outcome.floors.samples.append(_floors(plan, directory))
            while len(resident.measured.times) < plan.rounds:  # nobody else took part
                resident.round()
            resident.weigh()
            process.close()
    return outcome


def _measure(
    key: Key, place: str, plan: Plan, directory: Path, ours: _Entered, outcome: Outcome
) -> EntrantFailedError | None:
    """Let one entrant take turns with ours; return what ended that early."""
    own = _folder(directory, key)
    try:
        with _process(place, plan, own) as process:
            guest = _Entered(key, process, plan, outcome.notes)
            for _ in range(plan.rounds):
                guest.round()
                ours.round()
            guest.weigh()
            process.close()
            outcome.measured.append(guest.measured)
    except EntrantFailedError as exc:
        return exc
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return None


def _folder(directory: Path, key: Key) -> Path:
    # Plain names: torch makes URLs of paths and does not take spaces in them.
    own = directory / "".join(letter if letter.isalnum() else "-" for letter in f"{key.system}-{key.case}")
    own.mkdir()
    return own


def _process(place: str, plan: Plan, directory: Path) -> EntrantProcess:
    return EntrantProcess(place, question=plan.question, state=plan.state, size=plan.size, directory=directory)


def _floors(plan: Plan, directory: Path) -> dict[str, dict[str, float]]:
    """Sample the floors in a process of its own, which takes its memory with it."""
    os.sync()
    command = [sys.executable, "-m", "bench.floors", "--size", str(plan.size), "--dir", str(directory)]
    home = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=home)
    sample: dict[str, dict[str, float]] = json.loads(done.stdout)
    return sample
