"""export as a shell sees it: output, exit status, screens, what it imports."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from aiockpt.cli.main import main
from tests.cli.shell import Terminal, command
from tests.cli.test_commands import flip, tensor_file
from tests.cli.test_screens import HELD

pytestmark = pytest.mark.process

NO_TORCH = "sys.modules['torch'] = sys.modules['numpy'] = None"


def test_the_newest_step(run_directory: Path, tmp_path: Path) -> None:
    """Into a directory, with a line that says what is there and what is not; no torch is needed for it."""
    done = command("export", run_directory, "--to", tmp_path / "out", code=NO_TORCH)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"step 10: 1 tensor, 1.14 MiB, in {tmp_path}/out\nleft out: 1 value, which a .pt file would hold\n"
    )
    found = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["model.weight"], torch.full((300, 1000), 10.0))


def test_a_step_and_a_part_for_programs(run_directory: Path, tmp_path: Path) -> None:
    """JSON, which needs no rich; a step's directory will do for a run."""
    target = tmp_path / "m.safetensors"
    arguments = ("--part", "model", "--to", target, "--json")
    done = command("export", run_directory, "--step", "5", *arguments, code=f"{NO_TORCH}; sys.modules['rich'] = None")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report == {
        "step": 5,
        "source": str(run_directory / "step-5"),
        "path": str(target),
        "kind": "safetensors",
        "files": ["m.safetensors"],
        "tensors": 1,
        "nbytes": 1_200_000,
        "values_left_out": 0,
        "tied": {},
        "converted": {},
    }
    assert list(safetensors.torch.load_file(target)) == ["weight"]
    target.unlink()
    again = command("export", run_directory / "step-5", *arguments)
    assert json.loads(again.stdout) == report


def test_a_torch_file(run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its values."""
    assert main(["export", str(run_directory), "--to", f"{tmp_path}/state.pt"]) == 0
    assert capsys.readouterr() == (f"step 10: 1 tensor, 1.14 MiB, in {tmp_path}/state.pt\n", "")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["progress"] == {"step": 10}


def test_shards_and_tied_weights(trained_run: Path, tmp_path: Path) -> None:
    """The screen names what the files hold in another way."""
    target = tmp_path / "out"
    done = command("export", trained_run, "--part", "model", "--to", target, "--max-shard-size", "2.5kB")
    assert done.stdout == f"step 200: 17 tensors, 5.25 KiB, 4 files, in {target}\ntied: tokens.weight is head.weight\n"
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert sorted({*index["weight_map"].values(), "model.safetensors.index.json"}) == sorted(os.listdir(target))


def test_globs(trained_run: Path, tmp_path: Path) -> None:
    """Given again, they add up."""
    command("export", trained_run, "--tensors", "*.norm", "--tensors", "data", "--to", tmp_path / "m.safetensors")
    names = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert {"data.order", "data.seen", "model.blocks.0.norm.weight", "ema.blocks.3.norm.bias"} <= names.keys()
    assert all(".norm." in name or name.startswith("data.") for name in names)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{tmp}/nowhere", "--to", "{tmp}/new"), "it does not exist"),
        (("{tmp}/foreign", "--to", "{tmp}/new"), "neither aiockpt.json nor a checkpoint"),
        (("{run}", "--step", "7", "--to", "{tmp}/new"), "it has 0, 5, 10"),
        (("{run}", "--step", "-1", "--to", "{tmp}/new"), "not a whole number"),
        (("{run}", "--part", "nope", "--to", "{tmp}/new"), "at the top it has model, progress"),
        (("{run}", "--part", "progress", "--to", "{tmp}/new"), "export to a .pt file"),
        (("{run}", "--tensors", "nope.*", "--to", "{tmp}/new"), "nothing is named 'nope.*'"),
        (("{run}", "--tensors", "nope.*", "--to", "{tmp}/new.pt"), "nothing is named 'nope.*'"),
        (("{run}", "--to", "{tmp}/foreign"), "it exists already"),
        (("{run}", "--to", "{tmp}/foreign/notes.txt"), "it exists already"),
        (("{run}", "--to", "{tmp}/no/where"), "is no directory"),
        (("{run}", "--to", "{run}/new"), "is a run"),
        (("{run}", "--max-shard-size", "0", "--to", "{tmp}/new"), "no size of at least 1 byte"),
        (("{run}", "--max-shard-size", "5 bananas", "--to", "{tmp}/new"), "no size"),
        (("{run}",), "--to"),
        (("--to", "{tmp}/new"), "RUN"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    run_directory: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    """And nothing is written."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("x")
    done = command("export", *(part.format(tmp=tmp_path, run=run_directory) for part in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["foreign", "run"]
    assert os.listdir(tmp_path / "foreign") == ["notes.txt"]


def test_damage_is_one_line_that_says_where(run_directory: Path, tmp_path: Path) -> None:
    """No older step is taken for it, as a restore would; nothing is written."""
    file = tensor_file(run_directory, 10)
    flip(file, file.stat().st_size - 1)
    done = command("export", run_directory, "--to", tmp_path / "new")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{file} is damaged at byte 4096" in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["run"]


def test_a_step_without_a_manifest(run_directory: Path, tmp_path: Path) -> None:
    """Is damaged, in one line."""
    (run_directory / "step-5" / "manifest.json").unlink()
    done = command("export", run_directory, "--step", "5", "--to", tmp_path / "new")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "step 5 is damaged" in done.stderr


@pytest.mark.parametrize("target", ["new", "new.pt"])
def test_ctrl_c_leaves_nothing(run_directory: Path, tmp_path: Path, target: str) -> None:
    """While the bar shows that it reads."""
    code = HELD.format(gate=str(tmp_path / "gate"))
    with Terminal("export", run_directory, "--to", tmp_path / target, code=code) as terminal:
        terminal.wait_for(lambda: "step 10 ━" in terminal.text, "the bar")
        terminal.type(b"\x03")
        assert terminal.finish() == 130
        assert "Traceback" not in terminal.text
    assert os.listdir(tmp_path) == ["run"]


def test_on_a_terminal(run_directory: Path, tmp_path: Path) -> None:
    """The bar leaves, the line stays."""
    with Terminal("export", run_directory, "--to", tmp_path / "new", columns=200) as terminal:
        assert terminal.finish() == 0
        assert terminal.lines == [
            f"step 10: 1 tensor, 1.14 MiB, in {tmp_path}/new",
            "left out: 1 value, which a .pt file would hold",
        ]
        assert "━" in terminal.written.decode()
