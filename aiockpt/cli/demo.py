"""``aiockpt demo``: a training run is killed in the middle of a save, and nobody can tell from its losses.

The parent imports no torch; it starts trainers (``demo_train``), kills one, and compares what they say.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiockpt.cli.demo_screen import Screen, show_result
from aiockpt.cli.demo_trainer import Trainer
from aiockpt.errors import ConfigError, WorkerExitedError
from aiockpt.storage.failures import storage_errors

__all__ = ["Run", "Story", "run"]

_SAVES = 6
"""Saves of a run, about; enough for a table, few enough that each has its own training steps beside it."""
_TIDY_SECONDS = 5.0
_TRIES = 3
"""Trainings until one is killed in time: on a machine that is busy this process may hear of each save too late."""


@dataclass
class Run:
    """What trainers said, by step; a step that was trained twice has to have the same loss twice."""

    losses: dict[int, str] = field(default_factory=dict)
    """As hexadecimal floats: every bit."""
    saves: dict[int, dict[str, float]] = field(default_factory=dict)
    digest: str = ""
    repeated: int = 0
    """Steps trained again after the kill."""
    differing: list[int] = field(default_factory=list)
    """Steps whose second loss was not the first."""
    resumed_step: int | None = None

    def hear(self, event: dict[str, Any]) -> None:
        """Take in one event."""
        match event["event"]:
            case "step":
                former = self.losses.setdefault(event["step"], event["loss"])
                if former != event["loss"]:
                    self.differing.append(event["step"])
            case "saved":
                self.saves[event["step"]] = event
            case "resumed":
                self.resumed_step = event["step"]
            case "done":
                self.digest = event["digest"]
            case "refused":
                raise ConfigError("the demo did not start", why=event["why"], next="choose another --device")

    def half_a_save(self) -> float:
        """Return about half of the seconds that a save takes here, from those that were heard of; 0 before that."""
        return min((save["durable"] for save in self.saves.values()), default=0.0) / 2


@dataclass
class Story:
    """All that happened."""

    every: int
    reference: Run = field(default_factory=Run)
    saving: Run = field(default_factory=Run)
    killed_saving: int | None = None
    """The step whose save was under way when the trainer was killed."""
    last_step_before: int = -1
    """The last step that the killed trainer reported."""
    attempt_committed: bool = False
    """The worker finished that save although its trainer was dead."""
    seconds: float = 0.0

    def differences(self) -> list[str]:
        """Return what is not bit-exact, in words; empty is what the demo is about."""
        found = [
            f"step {step}: loss {float.fromhex(loss):.9g} without, {_loss(self.saving.losses.get(step))} with the kill"
            for step, loss in sorted(self.reference.losses.items())
            if self.saving.losses.get(step) != loss
        ]
        found += [f"step {step}: trained twice with two losses" for step in self.saving.differing]
        if self.saving.digest != self.reference.digest:
            found.append("the final states (model, optimizer, scheduler, random numbers, data position) differ")
        return found


def run(args: argparse.Namespace) -> int:
    """Play the story and show its end; 1 where anything is not bit-exact."""
    screen = Screen(2 * args.steps)
    start = time.monotonic()
    with _directory(args.dir) as directory, screen:
        options = {name: getattr(args, name) for name in ("size", "steps", "seed", "device")}
        story = Story(every=max(1, args.steps // _SAVES))
        options["every"] = story.every
        _train_uninterrupted(directory, options, story, screen)
        _train_and_kill(directory / "run", options, story, screen)
        _train_resumed(directory / "run", options, story, screen)
        story.seconds = time.monotonic() - start
    show_result(screen.console, story, kept=directory / "run" if args.dir else None)
    return 1 if story.differences() else 0


@contextmanager
def _directory(parent: str | None) -> Iterator[Path]:
    """Make a directory for the runs; it stays where the user named a place for it."""
    # /var/tmp is on a disk wherever there is one; /tmp is often memory, and the figures would be of no use.
    place = parent or next((name for name in ("/var/tmp",) if os.access(name, os.W_OK)), tempfile.gettempdir())
    with storage_errors("the demo's directory was not made", place):
        os.makedirs(place, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix="aiockpt-demo-", dir=place))
    try:
        yield directory
    finally:
        if parent is None:
            _remove(directory)


def _remove(directory: Path) -> None:
    """Remove a tree in which the worker of a killed trainer may be tidying up still."""
    deadline = time.monotonic() + _TIDY_SECONDS
    while directory.exists() and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.02)


def _train_uninterrupted(directory: Path, options: dict[str, Any], story: Story, screen: Screen) -> None:
    screen.stage("an uninterrupted run, with torch.save")
    with Trainer(directory / "reference.pt", options, reference=True) as trainer:
        for event in trainer.events():
            story.reference.hear(event)
            screen.hear(event)


def _train_and_kill(run: Path, options: dict[str, Any], story: Story, screen: Screen) -> None:
    """Train with aiockpt until the trainer is killed in the middle of a save; anew where every save was over before."""
    for _ in range(_TRIES):
        screen.stage("the same with aiockpt, until it is killed")
        _train_until_killed(run, options, story, screen)
        if story.killed_saving is not None:
            step = story.killed_saving
            screen.note(f"SIGKILL after step {story.last_step_before}, while step {step} was being saved")
            return
        shutil.rmtree(run)
        screen.again(len(story.saving.losses))
        story.saving = Run()
    raise WorkerExitedError(
        "the demo could not kill its trainer in the middle of a save",
        why=f"in {_TRIES} runs every save was over before it was seen",
        next="take a larger --size, or more --steps",
    )


def _train_until_killed(run: Path, options: dict[str, Any], story: Story, screen: Screen) -> None:
    """From the middle of the training on, kill the trainer as soon as a save of its is under way."""
    with Trainer(run, options) as trainer:
        for event in trainer.events():
            story.saving.hear(event)
            screen.hear(event)
            if event["event"] == "saving" and 2 * (event["step"] + 1) >= options["steps"]:
                last = event["step"] + story.every >= options["steps"]
                if not trainer.kill_while_saving(run, event["step"], after=0.0 if last else story.saving.half_a_save()):
                    continue
                story.killed_saving = event["step"]
                for unheard in trainer.last_events():
                    story.saving.hear(unheard)
                break
        story.last_step_before = max(story.saving.losses, default=-1)


def _train_resumed(run: Path, options: dict[str, Any], story: Story, screen: Screen) -> None:
    screen.stage("started again")
    with Trainer(run, options) as trainer:
        for event in trainer.events():
            story.saving.hear(event)
            screen.hear(event)
            if event["event"] == "resumed":
                story.attempt_committed = event["step"] == story.killed_saving
                story.saving.repeated = story.last_step_before - (-1 if event["step"] is None else event["step"])
                screen.resumed(event["step"], by_worker=story.attempt_committed)


def _loss(text: str | None) -> str:
    return "none" if text is None else f"{float.fromhex(text):.9g}"
