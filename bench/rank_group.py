"""The parent's hold on the processes of all ranks of one job, which answer as one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.entrants import Entry
from bench.process import EntrantFailedError, EntrantProcess

__all__ = ["RankGroup", "of_rank"]


def of_rank(name: str, rank: int) -> str:
    """Return the name of one rank's figure in an answer."""
    return f"{name}/{rank}"


class RankGroup:
    """Starts the ranks and lets them meet; a context manager that leaves no process behind.

    An answer has, under its name, the greatest figure of all ranks, as a job is as fast as its slowest rank; those of
    each rank stand beside it, see ``of_rank``.

    Args:
        entry: What is measured, in which state.
        world: Number of ranks.
        size: Bytes of the whole state.
        directory: Of this job.
    """

    def __init__(self, entry: Entry, world: int, size: int, directory: Path) -> None:
        self._stack = contextlib.ExitStack()
        self._ranks: list[EntrantProcess] = []
        given = {"place": entry.place, "state": entry.state, "size": size, "world": world, "dir": directory}
        with contextlib.ExitStack() as stack:
            for rank in range(world):
                process = EntrantProcess(given | {"rank": rank}, module="bench.rank_child")
                self._ranks.append(stack.enter_context(process))
            self._stack = stack.pop_all()

    @property
    def pid(self) -> int:
        """The trainer of rank 0, whose worker is the hub."""
        return self._ranks[0].pid

    def __enter__(self) -> Self:
        try:
            first, *_ = [process.answer() for process in self._ranks]
            self._tell(f"meet {first['port']}")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command to all ranks, then wait for all answers.

        Raises:
            EntrantFailedError: A rank failed.
        """
        self._tell(command)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for an answer of each rank.

        Raises:
            EntrantFailedError: A rank failed.
        """
        answers = []
        for rank, process in enumerate(self._ranks):
            try:
                answers.append(process.answer())
            except EntrantFailedError as exc:
                raise EntrantFailedError(f"rank {rank}: {exc}") from exc
        return _together(answers)

    def close(self) -> None:
        """Let all ranks close, and their processes end."""
        with contextlib.suppress(EntrantFailedError):
            self.ask("close")
            for process in self._ranks:
                process.join()

    def _tell(self, command: str) -> None:
        for process in self._ranks:
            process.tell(command)


def _together(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in answers[0]:
        found[name] = max(answer[name] for answer in answers)
        found |= {of_rank(name, rank): answer[name] for rank, answer in enumerate(answers)}
    return found
