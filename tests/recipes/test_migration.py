"""docs/migration.md: a training begins on the left side, is brought over, and ends on the right as if it had stayed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aiockpt import blocking
from aiockpt.cli.main import main
from tests.markdown import blocks
from tests.recipes.reader import Reader
from tests.state.rebuild import same

pytestmark = [
    pytest.mark.process,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),  # DCP's, of one process
    pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated:UserWarning"),  # DCP's own
]

COMMANDS = [line.split()[1:] for block in blocks("docs/migration.md", "sh") for line in block.code.splitlines() if line]

SYSTEMS = {
    "torch.save": ("torch_save_before.py", "torch_save_bring.py", "torch_save_after.py"),
    "DCP": ("dcp_before.py", "dcp_bring.py", "dcp_after.py"),
    "torch_checkpointing": (
        "torch_checkpointing_before.py",
        "torch_checkpointing_bring.py",
        "torch_checkpointing_after.py",
    ),
}


def weights(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[int, Any]]:
    return dict(model.state_dict()), optimizer.state_dict()["state"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_training_that_is_brought_over(system: str, tmp_path: Path) -> None:
    """Weights and the optimizer's state at the end are those of a training that was never stopped."""
    before, bring, after = SYSTEMS[system]
    reader = Reader(tmp_path / "reader", steps=20)
    if system == "torch_checkpointing":  # starts a process that imports the script again
        pytest.importorskip("torch_checkpointing", reason="torch_checkpointing is not installed")
        subprocess.run([sys.executable, before], cwd=reader.folder, env=reader.environment, check=True)
    else:
        reader.run(before)
    reader.run(bring)
    assert blocking.steps(reader.folder / "runs/exp1") == [19]
    reader.train_for(30)
    names = reader.run(after)
    assert blocking.steps(reader.folder / "runs/exp1") == [19, 29]
    with reader.inside():
        import training  # type: ignore[import-not-found]  # the reader's

        model, optimizer = training.build()
        for _ in range(30):
            training.train_step(model, optimizer)
    assert same(weights(names["model"], names["optimizer"]), weights(model, optimizer))


def test_files_of_weights(tmp_path: Path) -> None:
    """The commands of the page make runs of a torch.save file, of safetensors, and of a directory of these."""
    reader = Reader(tmp_path / "reader")
    left = reader.run("safetensors_before.py")["model"].state_dict()
    right = reader.run("safetensors_after.py")["model"].state_dict()
    assert same(left, right)
    (written,) = (reader.folder / "runs/weights/step-0/model").glob("*.safetensors")
    assert same(load_file(written), dict(sorted(left.items())) | load_file(written))
    torch.save(left, reader.folder / "weights.pt")
    (reader.folder / "hub").mkdir()
    shutil.copytree(written.parent, reader.folder / "hub/llama-7b")
    with reader.inside():
        assert [main(command) for command in COMMANDS] == [0] * len(COMMANDS)
        for run in ("runs/from-weights", "runs/from-file", "runs/from-directory"):
            assert same(dict(sorted(blocking.load(run)["model"].items())), dict(sorted(left.items())))
    brought = reader.run("safetensors_bring.py")["model"]
    assert same(brought.state_dict(), left)


def test_back_to_torch_save(tmp_path: Path) -> None:
    """The export of the page is a file that ``torch.load(weights_only=True)`` takes."""
    reader = Reader(tmp_path / "reader")
    model = reader.run("torch_save_after.py")["model"]
    with reader.inside():
        assert main(["export", "runs/exp1", "--to", "checkpoint.pt"]) == 0
        exported = torch.load("checkpoint.pt", weights_only=True)
    assert same(dict(exported["model"]), dict(model.state_dict()))
