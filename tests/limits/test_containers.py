"""What docs/limits.md says of containers, in a PID namespace of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from aiockpt import blocking
from tests.support import PATIENCE_SECONDS, ROOT

pytestmark = pytest.mark.process

CONTAINER = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
"""Its first process is PID 1 there; when that ends, the kernel ends all others."""

DIES_WITH_A_STAGED_SAVE = """
    import os, signal, sys
    import torch, aiockpt

    run, main_process = sys.argv[1:]
    assert (os.getpid() == 1) == (main_process == "trainer")
    ckpt = aiockpt.blocking.Checkpointer(run)
    ckpt.open()
    ckpt.save(0, {"x": torch.zeros(4)}).result(60)
    worker = ckpt.statistics().worker_pid
    os.kill(worker, signal.SIGSTOP)
    ckpt.save(1, {"x": torch.ones(4)}).wait_staged()
    print(worker, flush=True)
    os._exit(3)
"""

LAUNCHER = 'worker=$("$@"); kill -CONT $worker; while kill -0 $worker 2>/dev/null; do sleep 0.05; done'
"""Stays until the worker has finished; as PID 1 it reaps what the trainer left."""


def run_in_container(command: list[str]) -> subprocess.CompletedProcess[str]:
    if subprocess.run([*CONTAINER, "true"], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no permission to make a PID namespace")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*CONTAINER, *command], env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )


def trainer(run: Path, main_process: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(DIES_WITH_A_STAGED_SAVE), str(run), main_process]


def test_a_trainer_that_is_the_main_process_takes_its_worker_along(tmp_path: Path) -> None:
    """The save that was staged when it died is lost; what was committed stands."""
    run = tmp_path / "run"
    done = run_in_container(trainer(run, "trainer"))
    assert done.returncode == 3, done.stderr
    with blocking.Checkpointer(run) as ckpt:
        assert ckpt.steps() == [0]


def test_under_a_launcher_the_worker_finishes(tmp_path: Path) -> None:
    """It is no longer the trainer's child then, and no zombie once it has ended."""
    run = tmp_path / "run"
    done = run_in_container(["bash", "-c", LAUNCHER, "launcher", *trainer(run, "launcher")])
    assert (done.returncode, done.stderr) == (0, "")
    assert blocking.steps(run) == [0, 1]
