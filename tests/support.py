"""Small states, bounded waits, and scripts in processes of their own, for tests of the whole."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.waiting import PATIENCE_SECONDS
from tests.waiting import wait_until as wait_until  # for those who take everything from here


class Training:
    """A model with AdamW that trains on made-up data, deterministic from its seed."""

    def __init__(self, width: int = 64, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.1), nn.Linear(width, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.width = width
        self.progress: dict[str, Any] = {"step": -1, "losses": []}

    @property
    def state(self) -> dict[str, Any]:
        import aiockpt

        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "rng": aiockpt.RNG(),
            "progress": self.progress,
        }

    def step(self) -> float:
        """Train one step and return its loss."""
        x = torch.randn(16, self.width)
        loss = self.model(x).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.progress["step"] += 1
        self.progress["losses"] = [*self.progress["losses"][-3:], loss.item()]
        return loss.item()

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Return copies of all tensors by a name of this class's own."""
        named = {f"model.{name}": tensor.clone() for name, tensor in self.model.state_dict().items()}
        for i, parameter in enumerate(self.model.parameters()):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                named[f"optimizer.{i}.{key}"] = value.clone()
        return named


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Fail unless both hold the same names with the same bits."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Hold a process with SIGSTOP for a while."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def is_alive(pid: int) -> bool:
    """Tell whether a process exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def attempts(run: Path) -> list[str]:
    """Return the attempt directories of a run."""
    return [name for name in os.listdir(run) if name.startswith(".step-")] if run.exists() else []


ROOT = Path(__file__).parent.parent


def python_path() -> str:
    """Return a ``PYTHONPATH`` by which a child finds the project, and what this process finds by its own."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def start_script(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start Python on ``code`` with the project importable; stdout is a pipe of text."""
    environment = os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=options.pop("stderr", subprocess.PIPE),
        text=True,
        env=environment,
        **options,
    )


def run_script(code: str, *arguments: object, timeout: float = PATIENCE_SECONDS) -> subprocess.CompletedProcess[str]:
    """Run ``code`` to its end and return its output."""
    process = start_script(code, *arguments)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"the script hung\n{out}\n{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
