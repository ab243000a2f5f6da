"""What is to be started, checked before anything is touched: pure code but for looking for programs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiockpt.elastic.numa import NumaOptions
from aiockpt.elastic.printing.logs import LogsSpecs
from aiockpt.errors import ConfigError

__all__ = ["Plan", "check_full_rank", "environments", "find_program"]


@dataclass(frozen=True)
class Plan:
    """A group of processes to start.

    Attributes:
        name: What they are called.
        envs: The whole environment of each, by local rank.
        logs_specs: Says where output and errors go.
        prefixes: Of lines on the console, by local rank; None for ``[name + rank]:``.
        numa_options: How they are bound to processors; None for not at all.
        stdout_filters: Lines of stdout that contain one of these go to one file for all.
        stderr_filters: The same of stderr.
        stop_timeout: Seconds for every stop that is given no other.
    """

    name: str
    envs: Mapping[int, Mapping[str, str]]
    logs_specs: LogsSpecs
    stop_timeout: float
    prefixes: Mapping[int, str] | None = None
    numa_options: NumaOptions | None = None
    stdout_filters: Sequence[str] = field(default=())
    stderr_filters: Sequence[str] = field(default=())

    @property
    def nprocs(self) -> int:
        """Number of processes."""
        return len(self.envs)


def check_full_rank(what: str, by_rank: Mapping[int, Any], nprocs: int) -> None:
    """Check that a map has the local ranks 0 to ``nprocs - 1``, and no other.

    Raises:
        ConfigError: It has not.
    """
    expected, actual = set(range(nprocs)), set(by_rank)
    if expected != actual:
        raise ConfigError(
            f"no process was started: {what} is not given for each of the local ranks",
            why=f"expected the keys {sorted(expected)}, got {sorted(actual, key=repr)}",
            next=f"give {what} as a map from every local rank, counted from 0",
        )


def environments(
    base: Mapping[str, str], envs: Mapping[int, Mapping[str, str]], args: Mapping[int, Sequence[Any]]
) -> dict[int, dict[str, str]]:
    """Return the whole environment of each process: ours, overlaid by its own.

    Raises:
        ConfigError: A name, a value or an argument cannot be handed to a process.
    """
    made = {}
    inherited = dict(base)  # once: os.environ decodes whatever is read from it
    for rank, own in envs.items():
        texts = [*own, *own.values(), *(arg for arg in args[rank] if isinstance(arg, str))]
        for text in texts:
            if not isinstance(text, str) or "\0" in text:
                raise ConfigError(
                    f"no process was started: {text!r} of local rank {rank} cannot be handed to a process",
                    why="names and values of an environment, and arguments, are text without NUL",
                    next="pass it as text",
                )
        if any("=" in name or not name for name in own):
            raise ConfigError(
                f"no process was started: local rank {rank} has an environment variable without a proper name",
                why=f"names are not empty and hold no '=': {sorted(own)}",
                next="correct its name",
            )
        made[rank] = {**inherited, **own}
    return made


def find_program(program: str, env: Mapping[str, str]) -> str:
    """Return the path of a program as the process that is to run it would find it.

    Raises:
        ConfigError: There is none, or it may not be executed.
    """
    found = shutil.which(program, path=env.get("PATH", os.defpath))
    if found is not None:
        return found
    if os.path.dirname(program) and os.path.exists(program):
        why = "it is a directory" if os.path.isdir(program) else "the file has no permission to be executed"
        advice = f"make it executable (chmod +x {program}), or start its interpreter with it as the first argument"
    else:
        why = "there is no such file" if os.path.dirname(program) else f"no directory of PATH has it: {env.get('PATH')}"
        advice = "give the path of a program"
    raise ConfigError(f"no process was started: {program!r} cannot be executed", why=why, next=advice)
