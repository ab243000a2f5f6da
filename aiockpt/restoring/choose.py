"""Which checkpoints a path and a step may mean."""

from __future__ import annotations

import logging
import os
from typing import NamedTuple

from aiockpt.errors import CheckpointCorruptError, ConfigError, StepNotFoundError
from aiockpt.format.names import MANIFEST_NAME, parse_step
from aiockpt.storage.run_directory import Committed, Scan, Unreadable, is_step_directory, scan
from aiockpt.storage.run_record import check_run

__all__ = ["Candidate", "Choice", "choose"]

_log = logging.getLogger("aiockpt.restore")
_MOST_NAMED = 10


class Candidate(NamedTuple):
    """A directory that may be opened."""

    path: str
    committed: Committed | None
    """What the run's list says of it; None where the directory itself was given."""


class Choice(NamedTuple):
    """Directories to be tried, in this order."""

    path: str
    """What was given, absolute."""
    candidates: list[Candidate]
    explicit: bool
    """Whether one was named, so that no other will do."""
    damaged: list[CheckpointCorruptError]
    """Of directories that are named as checkpoints and have no usable head."""


def choose(path: str | os.PathLike[str], step: int | None) -> Choice:
    """Look at a run, or at one step's directory.

    Raises:
        ConfigError: The path is no run or step, or of a newer format; ``step`` is no step, or not that of the
            directory.
        StepNotFoundError: The run does not have ``step``.
        CheckpointCorruptError: It has, without a usable head.
        StorageError: The run, or a manifest in it, cannot be read.
    """
    where = _absolute(path)
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
        raise ConfigError(
            "step was refused", why=f"{step!r} is not an int >= 0", next="give a training step", argument="step"
        )
    if is_step_directory(where):
        named = parse_step(os.path.basename(where))
        if step is not None and named not in (None, step):
            raise ConfigError(
                f"{where} was refused",
                why=f"it is step {named}, and step={step} was asked for",
                next="give the run's directory with step=, or one step's directory without",
                argument="step",
                path=where,
            )
        return Choice(where, [Candidate(where, None)], True, [])
    check_run(where)
    found = scan(where)
    return _newest_first(where, found) if step is None else _the_one(where, found, step)


def _absolute(path: str | os.PathLike[str]) -> str:
    given: object = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(given, str) or not given or "\0" in given:
        raise ConfigError(
            "path was refused",
            why=f"{path!r} is not the path of a directory",
            next="give a run, or one step's directory",
            argument="path",
        )
    return os.path.abspath(given)


def _newest_first(run: str, found: Scan) -> Choice:
    candidates = [Candidate(committed.path, committed) for committed in found.checkpoints]
    return Choice(run, candidates, False, [_damage(bad) for bad in found.unreadable])


def _the_one(run: str, found: Scan, step: int) -> Choice:
    for index, committed in enumerate(found.checkpoints):
        if committed.step == step:
            if index:
                newer = ", ".join(str(other.step) for other in found.checkpoints[:index][:_MOST_NAMED])
                _log.warning("step %d of %s is restored while newer ones stand: %s", step, run, newer)
            return Choice(run, [Candidate(committed.path, committed)], True, [])
    for bad in found.unreadable:
        if bad.step == step:
            raise _damage(bad)
    standing = ", ".join(str(known.step) for known in found.checkpoints[:_MOST_NAMED]) or "none"
    raise StepNotFoundError(
        f"{run} has no checkpoint of step {step}",
        why=f"newest first, it has: {standing}",
        next="choose one of these, or leave step= out for the newest",
        step=step,
        path=run,
    )


def _damage(bad: Unreadable) -> CheckpointCorruptError:
    return CheckpointCorruptError(
        f"{bad.path} is no checkpoint",
        why=bad.why,
        next="restore another step",
        step=bad.step,
        file=f"{bad.path}/{MANIFEST_NAME}",
        offset=0,
    )
