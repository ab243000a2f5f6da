"""A job whose ranks do what the test says, and a look at the disk behind it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from aiockpt import blocking
from aiockpt.storage.faults import FaultPoint
from aiockpt.storage.verify import verify_checkpoint
from aiockpt.testing.faults import FaultRule
from tests.crash.arming import arm
from tests.ranks.job import Job, Nursery
from tests.waiting import PATIENCE_SECONDS, wait_until

__all__ = ["Answer", "Crew", "Role", "left_over", "rule", "value_of", "values_of", "wait_tidy"]

Role = Literal["worker", "trainer"]
Answer = dict[str, Any]

CODE = """
    from tests.crash.rank import serve
    serve(rank, *args)
"""


class Crew:
    """One job; its ranks have opened the run.

    Args:
        nursery: Forks the ranks.
        directory: For output and armed faults; fresh.
        run: Of the run.
        world: How many ranks.
        rules: Armed from the beginning, by role and rank.
        opens: Whether the ranks open the run now.
        options: Of the Checkpointers.
    """

    def __init__(
        self,
        nursery: Nursery,
        directory: Path,
        run: Path,
        *,
        world: int = 4,
        rules: dict[tuple[Role, int], Sequence[FaultRule]] | None = None,
        opens: bool = True,
        **options: Any,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.run = run
        self.world = world
        self.workers: set[int] = set()
        """Every worker that was seen."""
        self._directory = directory
        for (role, rank), wanted in (rules or {}).items():
            self.arm(role, rank, *wanted)
        address = str(directory / "test")
        self._connections: dict[int, socket.socket] = {}
        self._lines: dict[int, Any] = {}
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(world)
            listener.settimeout(PATIENCE_SECONDS)
            self.job = Job(nursery, directory, world, CODE, address, directory, run, options)
            for _ in range(world):
                connection, _ = listener.accept()
                connection.settimeout(PATIENCE_SECONDS)
                lines = connection.makefile("rw")
                rank = int(lines.readline())
                self._connections[rank], self._lines[rank] = connection, lines
        if opens:
            for answer in self.ask("open").values():
                assert answer["kind"] == "done", answer

    # ---- faults

    def arm(self, role: Role, rank: int, *rules: FaultRule) -> None:
        """Let a process of a rank meet these, one after the other."""
        arm(self._armed(role, rank), rules)

    def is_armed(self, role: Role, rank: int) -> bool:
        """Tell whether a rule is left that was not met."""
        return self._armed(role, rank).exists()

    def _armed(self, role: Role, rank: int) -> Path:
        return self._directory / f"{role}-{rank}.json"

    # ---- the ranks

    def ask(self, do: str, ranks: Iterable[int] | None = None, **arguments: Any) -> dict[int, Answer]:
        """Have ranks do something at once, and return their answers."""
        asked = self.tell(do, ranks, **arguments)
        return self.hear(asked)

    def tell(self, do: str, ranks: Iterable[int] | None = None, **arguments: Any) -> list[int]:
        """Have ranks begin something; ``hear`` returns the answers."""
        asked = list(range(self.world) if ranks is None else ranks)
        for rank in asked:
            self._tell(rank, json.dumps({"do": do, **arguments}))
        return asked

    def hear(self, ranks: Iterable[int]) -> dict[int, Answer]:
        """Return what ranks answer; that of one that has died on it is of kind ``dead``."""
        return {rank: self._answer(rank) for rank in ranks}

    def _tell(self, rank: int, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it is dead, and says nothing
            self._lines[rank].write(line + "\n")
            self._lines[rank].flush()

    def _answer(self, rank: int) -> Answer:
        try:
            line = self._lines[rank].readline()
        except ConnectionResetError:
            line = ""
        except TimeoutError:
            raise AssertionError(f"rank {rank} hangs\n{self.job.report()}") from None
        return json.loads(line) if line else {"kind": "dead"}

    def look(self, ranks: Iterable[int] | None = None) -> dict[int, Answer]:
        """Return what is known of ranks: worker, restarts, descriptors."""
        found = self.ask("look", ranks)
        self.workers |= {answer["worker"] for answer in found.values() if answer.get("worker")}
        return found

    def end(self) -> None:
        """Hang up; ranks that have not ended by themselves are killed."""
        for rank, lines in self._lines.items():
            with contextlib.suppress(BrokenPipeError):  # it died on what we said last
                lines.close()
            self._connections[rank].close()
        self.job.end()


# ---- the disk


def rule(point: FaultPoint, action: Any = "kill", **more: Any) -> FaultRule:
    return FaultRule(point=point, action=action, **more)


def value_of(run: Path, step: int) -> int:
    """Return which value a step holds, after all of it was read and verified."""
    verify_checkpoint(f"{run}/step-{step}")
    loaded = blocking.load(run, step=step)
    n = int(loaded["n"])
    assert loaded["same"]["w"].unique().tolist() == loaded["same"]["v"].unique().tolist() == [n]
    assert all(part.unique().tolist() == [n] for part in loaded["part"].values())
    assert loaded["own"]["w"].unique().tolist() == [n]  # rank 0's; those of others are restored by themselves
    return n


def values_of(run: Path) -> dict[int, int]:
    """Return by step which value it holds; everything is verified."""
    return {step: value_of(run, step) for step in blocking.steps(run)}


def left_over(run: Path, leaves: tuple[str, ...] | None = None) -> list[str]:
    """Return names in the run that only a save under way, a crash or a removal leaves.

    Args:
        run: Looked at.
        leaves: Of a job that has met faults and goes on: how names begin that its next opening puts in order. Empty
            attempts are among them: a hub leaves one where it dies before anybody has heard of it.
    """
    left = [path for path in run.iterdir() if path.name.startswith((".step-", ".old.", ".trash."))]
    if leaves is not None:
        left = [path for path in left if not path.name.startswith((*leaves, "-"))]
        left = [path for path in left if not (path.name.startswith(".step-") and is_empty(path))]
    return [path.name for path in left]


def is_empty(path: Path) -> bool:
    try:
        return not os.listdir(path)
    except FileNotFoundError:  # it is being moved away
        return True


def wait_tidy(run: Path, leaves: tuple[str, ...] | None = None) -> None:
    """Wait until nothing is left over: removals go on behind a save."""
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not left_over(run, leaves), "the run to be tidy", 20)
    left = left_over(run, leaves)
    assert not left, left
