"""Children under an ``Output``, as a context runs them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

import aiockpt.elastic.printing.output
from aiockpt.elastic.printing.output import Output

BACKENDS: dict[str, dict[str, Any]] = {
    "asyncio": {"backend": "asyncio"},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}
PATIENCE_SECONDS = 60.0

Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run on one loop, where the loop makes no difference."""
    anyio.run(body)


@dataclass
class Logs:
    """Where streams go, with the fields of ``LogsDest`` that matter."""

    stdouts: dict[int, str] = field(default_factory=dict)
    stderrs: dict[int, str] = field(default_factory=dict)
    tee_stdouts: dict[int, str] = field(default_factory=dict)
    tee_stderrs: dict[int, str] = field(default_factory=dict)
    filtered_stdout: str = ""
    filtered_stderr: str = ""


def teed(path: Path, nprocs: int = 1, *, stderr: bool = True) -> Logs:
    """Return that all ranks are teed, with files in ``path``."""
    outs = {rank: str(path / f"{rank}.out") for rank in range(nprocs)}
    errs = {rank: str(path / f"{rank}.err") for rank in range(nprocs)} if stderr else {}
    return Logs(outs, errs, dict(outs), dict(errs), str(path / "filtered.out"), str(path / "filtered.err"))


class FakeConsole:
    """What stands in the place of ``sys.stdout`` and ``sys.stderr``.

    In the eyes of the module alone: what a fixture puts in place in ``sys`` itself, pytest replaces before the test.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for name in ("stdout", "stderr")}
        monkeypatch.setattr(aiockpt.elastic.printing.output, "sys", SimpleNamespace(**self._streams))

    def read(self, name: str = "stdout") -> str:
        """Return all that was written to it."""
        buffer = self._streams[name].buffer
        assert isinstance(buffer, io.BytesIO)
        return buffer.getvalue().decode()

    def lines(self, name: str = "stdout") -> list[str]:
        """Return its lines."""
        return self.read(name).splitlines()


@contextmanager
def started(output: Output, commands: Mapping[int, Sequence[str]]) -> Iterator[dict[int, subprocess.Popen[bytes]]]:
    """Start a child for each rank and let go of its descriptors; at the end nothing of all is left."""
    children: dict[int, subprocess.Popen[bytes]] = {}
    try:
        for rank, command in commands.items():
            out, err = output.descriptors(rank)
            children[rank] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
            output.release(rank)
        yield children
    finally:
        for child in children.values():
            child.kill()
            child.wait()
        output.close()


async def wait_dead(children: Mapping[int, subprocess.Popen[bytes]]) -> None:
    """Wait until all are gone."""
    for child in children.values():
        pidfd = os.pidfd_open(child.pid)
        try:
            with anyio.fail_after(PATIENCE_SECONDS):
                await anyio.wait_readable(pidfd)
        finally:
            os.close(pidfd)


async def wait_for(condition: Callable[[], Any], what: str) -> None:
    """Poll until the condition holds, with the event loop going on."""
    with anyio.move_on_after(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110  # what is waited for is no event of this loop
            await anyio.sleep(0.002)
    assert condition(), f"timed out waiting for {what}"


async def supervise(
    output: Output,
    commands: Mapping[int, Sequence[str]],
    *,
    meanwhile: Callable[[dict[int, subprocess.Popen[bytes]]], Awaitable[None]] | None = None,
    timeout: float = PATIENCE_SECONDS,
) -> None:
    """Open, run the children to their end, finish and close."""
    output.open()
    with started(output, commands) as children:
        async with anyio.create_task_group() as group:
            group.start_soon(output.run)
            if meanwhile is not None:
                await meanwhile(children)
            await wait_dead(children)
            await output.finish(timeout)


def sh(code: str) -> list[str]:
    """Return the command of a child of the shell."""
    return ["/bin/sh", "-c", code]


def python(code: str) -> list[str]:
    """Return the command of a Python child; ``-S`` and ``-I`` spare it half its start."""
    return [sys.executable, "-S", "-I", "-c", code]


def flood(nbytes: int) -> list[str]:
    """Return the command of a child that prints so much, in lines of 100 bytes, and then says so on stderr."""
    return python(
        f"import os\nblock = (b'x' * 99 + b'\\n') * 1000\n"
        f"for _ in range({nbytes // 100_000}):\n"
        "    view = memoryview(block)\n"
        "    while view: view = view[os.write(1, view):]\n"
        "os.write(2, b'done\\n')"
    )
