"""The commands on checkpoints of several ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cli.shell import command
from tests.restoring.ranked import by_dim, write_ranks

pytestmark = pytest.mark.process


def test_cut_tensors_are_looked_at_compared_and_verified(tmp_path: Path) -> None:
    """Whole shapes and sizes, real distances, rank 0's of what each rank has for itself."""
    run = tmp_path / "run"
    for step in (1, 2):
        states = [
            {"model": {"w": torch.arange(12.0).reshape(3, 4) * step}, "own": {"t": torch.ones(2) * rank, "n": rank}}
            for rank in range(3)
        ]
        write_ranks(run, states, by_dim(1, 3), step=step, own=["own"])
    done = command("inspect", run, "--json", code="sys.modules['torch'] = None")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert [(item["name"], item["shape"], item["nbytes"]) for item in found["tensors"]] == [
        ("model.w", [3, 4], 48),
        ("own.t", [2], 8),
    ]
    assert {"name": "own.n", "value": 0} in found["values"]
    screen = command("inspect", run)
    assert (screen.returncode, screen.stderr) == (0, "")
    assert "float32 [3, 4]" in screen.stdout
    done = command("diff", run, "1", "2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (difference,) = json.loads(done.stdout)["tensors"]
    assert (difference["name"], difference["max_abs"], difference["unequal"]) == ("model.w", 11.0, 11)
    done = command("verify", run)
    assert (done.returncode, done.stderr) == (0, "")
