"""A checkpoint worker with a staged save in hand outlives its trainers and their supervisor; no other process does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from aiockpt import blocking
from aiockpt.elastic import SignalException, start_processes
from aiockpt.storage.faults import FaultPoint
from aiockpt.testing.faults import WORKER_ARGUMENT, FaultPlan, FaultRule
from tests.elastic.supervised import run
from tests.support import is_alive, python_path
from tests.waiting import wait_until

pytestmark = pytest.mark.process

HELD = FaultPlan(rules=[FaultRule(point=FaultPoint.WORKER_BEFORE_RENAME, action="stall")]).to_json()
"""The worker stops itself just before it publishes the checkpoint, until the test lets it go on."""


def train(directory: str, faults: str, linger: float, is_staged: bool = True) -> None:
    """Stage a save whose commit takes a while, leave the worker's pid, and be killed."""
    ckpt = blocking.Checkpointer(Path(directory) / "run", linger_timeout=linger)
    ckpt._coordinator.worker_faults = (WORKER_ARGUMENT, faults)
    ckpt.open()
    if is_staged:
        ckpt.save(0, {"x": torch.arange(1000)}).wait_staged()
    (Path(directory) / "worker.part").write_text(str(ckpt.statistics().worker_pid))
    os.rename(Path(directory) / "worker.part", Path(directory) / "worker")
    time.sleep(1000)


def worker_pid(directory: Path) -> int:
    path = directory / "worker"
    return int(wait_until(lambda: path.exists() and path.read_text(), "the staged save"))


def held_worker(directory: Path) -> int:
    """The pid of the worker that has stopped itself."""
    pid = worker_pid(directory)
    stat = Path(f"/proc/{pid}/stat")
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "the worker to stop")
    return pid


def steps(directory: Path) -> list[int]:
    return blocking.steps(directory / "run")


def test_a_staged_save_is_finished_when_trainers_are_killed(tmp_path: Path) -> None:
    """The block is left when it is committed (R-MP-26)."""

    async def body() -> None:
        async with start_processes("w", train, {0: (str(tmp_path), HELD, 60.0)}, {0: {}}) as context:
            worker = held_worker(tmp_path)
            os.kill(context.pids()[0], signal.SIGKILL)
            result = await context.wait()
            assert result is not None
            assert result.failures[0].exitcode == -9
            assert is_alive(worker)
            assert steps(tmp_path) == []
            os.kill(worker, signal.SIGCONT)
        assert not is_alive(worker)
        assert steps(tmp_path) == [0]

    run(body)


def test_without_a_staged_save_a_worker_ends_like_all(tmp_path: Path) -> None:
    """It is a descendant like any other then."""

    async def body() -> None:
        async with start_processes("w", train, {0: (str(tmp_path), HELD, 60.0, False)}, {0: {}}) as context:
            worker = worker_pid(tmp_path)
            os.kill(context.pids()[0], signal.SIGKILL)
            await context.wait()
            assert not is_alive(worker)

    run(body)


def test_its_time_is_linger_timeout(tmp_path: Path) -> None:
    """One that does not come to an end is killed; the save is absent, and the run is whole (R-MP-26)."""

    async def body() -> None:
        async with start_processes("w", train, {0: (str(tmp_path), HELD, 1.0)}, {0: {}}) as context:
            worker = held_worker(tmp_path)
            os.kill(context.pids()[0], signal.SIGKILL)
            await context.wait()
            began = time.monotonic()
        assert time.monotonic() - began < 5
        assert not is_alive(worker)
        assert steps(tmp_path) == []

    run(body)


SUPERVISOR = """
import anyio, sys
from aiockpt.elastic import SignalException, start_processes
from tests.elastic.test_spared_worker import HELD, train

async def main():
    async with start_processes("w", train, {0: (sys.argv[1], HELD, 60.0)}, {0: {}}) as context:
        print(context.pids()[0], flush=True)
        await anyio.sleep_forever()

if __name__ == "__main__":
    anyio.run(main)
"""


def test_a_staged_save_is_finished_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    """Its trainers are gone within a second, the worker when it has committed (R-MP-25, R-MP-26)."""
    environment = os.environ | {"PYTHONPATH": python_path()}
    command = [sys.executable, "-c", SUPERVISOR, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        trainer = int(supervisor.stdout.readline())
        worker = held_worker(tmp_path)
        supervisor.kill()
    wait_until(lambda: not is_alive(trainer), "the trainer's end", timeout=1)
    assert is_alive(worker)
    os.kill(worker, signal.SIGCONT)
    wait_until(lambda: not is_alive(worker), "the worker's end")
    assert steps(tmp_path) == [0]


def test_three_signals_do_not_wait_for_it(tmp_path: Path) -> None:
    """The supervisor leaves at once, and the guardian stays with the worker (R-MP-29)."""

    async def body() -> None:
        async with start_processes("w", train, {0: (str(tmp_path), HELD, 60.0)}, {0: {}}) as context:
            held_worker(tmp_path)
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(SignalException):
                await context.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    run(body)
    worker = held_worker(tmp_path)
    assert is_alive(worker)
    os.kill(worker, signal.SIGCONT)
    wait_until(lambda: not is_alive(worker), "the worker's end")
    assert steps(tmp_path) == [0]
