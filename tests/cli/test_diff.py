"""diff as a shell sees it: JSON, what it refuses, what it imports before that."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from tests.cli.shell import command
from tests.restoring.writing import write_step

pytestmark = pytest.mark.process


def test_for_programs_the_furthest_comes_first(tmp_path: Path) -> None:
    """One that became NaN, then by the relative distance; figures that are no JSON are null."""
    for step in (1, 2):
        state = {
            "small": torch.full((10,), 100.0 + step),
            "large": torch.full((10,), 1.0 * step),
            "same": torch.ones(3),
            "nan": torch.tensor([1.0, 1.0 if step == 1 else math.nan]),
            "from_zero": torch.tensor([0.0, step - 1.0]),
            "count": step,
        }
        write_step(tmp_path / "run", step, state)
    done = command("diff", tmp_path / "run", "1", "2", "--json", code="sys.modules['rich'] = None")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["a"], found["b"], found["equal_tensors"], found["equal_values"]) == (1, 2, 1, 0)
    assert [item["name"] for item in found["tensors"]] == ["nan", "from_zero", "large", "small"]
    assert found["tensors"][1]["relative"] is None
    assert found["tensors"][2]["max_abs"] == 1.0
    assert found["values"] == [{"name": "count", "a": 1, "b": 2}]
    screen = command("diff", tmp_path / "run", "1", "2")
    assert (screen.returncode, screen.stderr) == (0, "")
    assert "0 → 1" in screen.stdout


def test_nothing_differs(trained_run: Path) -> None:
    """A step and itself: status 0, as for any other pair."""
    done = command("diff", trained_run, "100", "100", "--tensors", "model")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1:] == ["nothing differs: 17 tensors and 0 values equal"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{tmp}/nowhere", "1", "2"), "it does not exist"),
        (("{tmp}/empty", "1", "2"), "neither aiockpt.json nor a checkpoint"),
        (("{run}/step-100", "1", "2"), "it is one checkpoint"),
        (("{run}", "100", "7"), "has no step 7; it has 100, 200"),
        (("{run}", "100", "newest"), "not a whole number"),
        (("{run}", "100"), "required: B"),
        (("{run}", "100", "200", "--limit", "0"), "at least 1"),
        (("{run}", "100", "200", "--tensors", "modle"), "'modle'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    trained_run: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    """Told before torch is imported."""
    (tmp_path / "empty").mkdir()
    parts = [part.format(tmp=tmp_path, run=trained_run) for part in arguments]
    done = command("diff", *parts, code="sys.modules['torch'] = None")
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_name_that_one_of_them_has_is_enough(trained_run: Path) -> None:
    """ema came with step 200."""
    done = command("diff", trained_run, "100", "200", "--tensors", "ema.tokens", code="sys.modules['torch'] = None")
    assert done.returncode == 0
    assert "+ ema.tokens.weight" in done.stdout


def test_damage_is_one_line_and_status_2(trained_run: Path, tmp_path: Path) -> None:
    """With file and offset, as verify has it."""
    shutil.copytree(trained_run, tmp_path / "run")
    file = tmp_path / "run" / "step-200" / "model" / "model-00001-of-00001.safetensors"
    with file.open("r+b") as opened:
        opened.seek(5000)
        opened.write(b"\xff\xff")
    done = command("diff", tmp_path / "run", "100", "200", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{file} is damaged at byte 4096" in done.stderr
    assert done.stderr.count("\n") == 1
