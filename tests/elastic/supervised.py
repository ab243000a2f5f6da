"""Start processes from tests: short forms, and what is alive."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio

from aiockpt.elastic import RunProcsResult, start_processes
from aiockpt.elastic.context import PContext

PATIENCE_SECONDS = 60

LOOPS: dict[str, dict[str, Any]] = {
    "asyncio": {"backend": "asyncio"},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}


def run(body: Callable[[], Awaitable[None]], loop: str = "uvloop") -> None:
    """Run a test's coroutine, for a minute at most."""

    async def bounded() -> None:
        with anyio.fail_after(PATIENCE_SECONDS):
            await body()

    anyio.run(bounded, **LOOPS[loop])


def functions(function: Callable[..., Any], *args: Sequence[Any], envs: Mapping[int, Mapping[str, str]] | None = None,
              **options: Any) -> PContext:  # fmt: skip
    """A function, with the arguments of each rank in turn."""
    by_rank = {rank: tuple(own) for rank, own in enumerate(args)}
    return start_processes("worker", function, by_rank, envs or {rank: {} for rank in by_rank}, **options)


def scripts(*texts: str, envs: Mapping[int, Mapping[str, str]] | None = None, **options: Any) -> PContext:
    """A shell for each rank, with a script."""
    args = {rank: ("-c", text) for rank, text in enumerate(texts)}
    return start_processes("worker", "/bin/sh", args, envs or {rank: {} for rank in args}, **options)


def pythons(*texts: str, **options: Any) -> PContext:
    """An interpreter for each rank, as a program of its own."""
    args = {rank: ("-c", text) for rank, text in enumerate(texts)}
    return start_processes("worker", sys.executable, args, {rank: {} for rank in args}, **options)


def deaf(ready: Path) -> str:
    """A script that no signal ends which can be refused; the file says that it is deaf by now."""
    return f"trap '' TERM INT; touch {ready}; while :; do sleep 0.1; done"


def failing(ready: Path) -> str:
    """A script that exits with 3 when another is ready."""
    return f"while ! [ -e {ready} ]; do sleep 0.01; done; exit 3"


async def result_of(context: PContext) -> RunProcsResult:
    """Run it to its end."""
    async with context:
        result = await context.wait()
    assert result is not None
    return result


def parent_of(pid: int) -> int:
    """The pid of a process's parent: of a child here, the guardian's."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def pids_in(path: Path) -> list[int]:
    """The pids that a process has left in a file; empty where it has not yet."""
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []
