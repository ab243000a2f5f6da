"""The recipes where something goes on beside the training: a server, another program, a signal."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from aiockpt import blocking
from tests.conftest import children
from tests.recipes.reader import RECIPES, Reader
from tests.state.rebuild import same
from tests.support import PATIENCE_SECONDS, attempts, stopped, wait_until

pytestmark = pytest.mark.process


def test_a_server_tells_of_the_save_in_flight(tmp_path: Path) -> None:
    """While a worker is held in the middle of a save, training goes on and the server answers."""
    reader = Reader(tmp_path / "reader")
    with reader.inside():
        names = RECIPES["web_server.py"].run(__name__="web_server")
        gate = _Gate(names["train_step"], after=15)
        names["train_step"] = gate.train_step
        asyncio.run(_watch(names, gate))
        assert blocking.steps("runs/web") == [9, 19, 29]


class _Gate:
    """Lets training make some steps and then wait until it is opened."""

    def __init__(self, train_step: Callable[..., float], *, after: int) -> None:
        self._train_step = train_step
        self._left = after
        self._open = threading.Event()
        self.open = self._open.set

    def train_step(self, *arguments: Any) -> float:
        self._left -= 1
        if self._left < 0:
            assert self._open.wait(PATIENCE_SECONDS)
        return self._train_step(*arguments)


async def _watch(names: dict[str, Any], gate: _Gate) -> None:
    others = children()
    now: dict[str, Any] = {"step": None, "loss": None, "save": None}
    runner = await names["serve"](now, 0)
    port = runner.addresses[0][1]
    try:
        async with aiohttp.ClientSession() as session, asyncio.timeout(PATIENCE_SECONDS):

            async def told_when(condition: Callable[[Any], bool]) -> Any:
                while True:
                    async with session.get(f"http://127.0.0.1:{port}/progress") as answer:
                        if condition(told := await answer.json()):
                            return told

            async with asyncio.TaskGroup() as group:
                training = group.create_task(names["train"]("runs/web", now))
                await told_when(lambda told: told["step"] == 14 and told["save"]["phase"] == "committed")
                (worker,) = children() - others
                with stopped(worker):
                    gate.open()
                    told = await told_when(lambda told: told["step"] == 29)  # it waits there for the slot
                    assert told["save"]["step"] == 19
                    assert told["save"]["phase"] in ("planned", "staging", "staged")
                    assert not training.done()
            told = await told_when(lambda told: told["save"]["phase"] == "committed")
            assert told["step"] == told["save"]["step"] == 29
    finally:
        await runner.cleanup()


def test_a_signal_makes_a_last_checkpoint(tmp_path: Path) -> None:
    """SIGTERM: the step under way is saved, durable when the process ends by itself."""
    reader = Reader(tmp_path / "reader", steps=10**9)
    process = start(reader, "preemption.py")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "saving step 99: every 100 steps\n"
        process.send_signal(signal.SIGTERM)
        said, complaints = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, complaints) == (0, "")
    # Where the signal came while that step was being saved, it is the last one.
    last = said.splitlines()[-1] if said else "saving step 99: SIGTERM"
    assert last.endswith(": SIGTERM")
    assert blocking.steps(reader.folder / "runs/preemption")[-1] == int(last.split()[2].rstrip(":"))


def test_a_model_is_read_beside_a_running_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Inference takes whole checkpoints of a run that is being written and pruned; safetensors reads the same."""
    reader = Reader(tmp_path / "reader", steps=10**9)
    run = reader.folder / "runs/classic"
    process = start(reader, "classic.py")
    try:
        wait_until(lambda: (run / "aiockpt.json").exists() and blocking.steps(run), "a checkpoint")
        seen = set()

        def sees_two() -> bool:
            assert not reader.run("inference.py")["model"].training
            seen.add(capsys.readouterr().out.split(":")[0])
            assert process.poll() is None
            return len(seen) > 1

        wait_until(sees_two, "a newer checkpoint")
    finally:
        process.kill()
        process.communicate()
    wait_until(lambda: not attempts(run), "the worker's end")
    found = reader.run("without_aiockpt.py")
    step = int(found["newest"].name.removeprefix("step-"))
    assert same(dict(found["model"].state_dict()), blocking.load(run, step=step, include="model.*")["model"])


def start(reader: Reader, name: str) -> subprocess.Popen[str]:
    """Start one of the files as a user would."""
    return subprocess.Popen(
        [sys.executable, name],
        cwd=reader.folder,
        env=reader.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
