"""The scripts in examples/ do what their first lines say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import aiockpt
from tests.support import ROOT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
STRICT = [sys.executable, "-W", "error"]

pytestmark = [pytest.mark.process, pytest.mark.timeout(200)]


def example(name: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [*STRICT, ROOT / "examples" / name, *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_async_loop_resumes(tmp_path: Path) -> None:
    """Each checkpoint is told of when it is durable; the second run goes on where the first ended."""
    run = tmp_path / "run"
    first = example("async_loop.py", run)
    assert first.count("durable after") == 3
    assert "nothing to resume" in first
    assert "resumed from step 29" in example("async_loop.py", run)
    assert aiockpt.blocking.steps(run) == [39, 49, 59]


def test_classic_loop(tmp_path: Path) -> None:
    """Every 20 steps, the last two kept."""
    run = tmp_path / "run"
    assert "60 losses" in example("classic_loop.py", run)
    assert aiockpt.blocking.steps(run) == [39, 59]


def test_classic_loop_saves_before_a_planned_stop(tmp_path: Path) -> None:
    """After a SIGTERM the script ends with a checkpoint of its very last step."""
    run = tmp_path / "run"
    endless = f"import classic_loop; classic_loop.STEPS = 10**9; classic_loop.main({str(run)!r})"
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([*STRICT, "-c", endless], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "every 20 steps" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[0]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    (stopped,) = [line for line in said.splitlines() if line.startswith("stopping after step")]
    assert aiockpt.blocking.steps(run)[-1] == int(stopped.split()[-1])


def test_resume_after_interrupt() -> None:
    """The losses of an interrupted run are those of a quiet one."""
    said = example("resume_after_interrupt.py")
    assert "resumed from step 9" in said
    assert "all 20 losses are equal, bit for bit" in said


def test_supervise() -> None:
    """One trainer is killed after its first checkpoint and named as the cause; the second time both come to the end."""
    said = example("supervise.py")
    root = said[said.index("Root Cause") :]
    assert "rank      : 1 (local_rank: 1)" in root
    assert "(SIGKILL)" in root
    assert "we stopped it with SIGTERM" in said[: said.index("Root Cause")]
    assert "[trainer1]:nothing to resume, beginning" in said
    assert "[trainer1]:resumed from step" in said
    assert said.count("steps the second time") == 2
