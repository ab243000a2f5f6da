"""import as a shell sees it: output, exit status, screens."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

import aiockpt.blocking
from aiockpt.cli.main import main
from tests.cli.shell import Terminal, command

pytestmark = pytest.mark.process


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Files of others: good ones, bad ones."""
    directory = tmp_path / "theirs"
    directory.mkdir()
    safetensors.torch.save_file({"w": torch.arange(6.0)}, directory / "m.safetensors")
    torch.save({"net": {"w": torch.arange(6.0)}, "epoch": 3}, directory / "m.pt")
    torch.save(torch.nn.Linear(2, 2), directory / "module.pt")
    (directory / "text.txt").write_text("this is no checkpoint")
    (directory / "empty").mkdir()
    whole = (directory / "m.safetensors").read_bytes()
    (directory / "short.safetensors").write_bytes(whole[:-1])
    return directory


def here(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Run the command in this process, which has torch already; return status and what it wrote."""
    try:
        status = main(["import", *map(str, arguments)])
    except SystemExit as exc:  # argparse
        status = int(exc.code or 0)
    return status, *capsys.readouterr()


def test_a_safetensors_file(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line says what became of it; it restores into a live module."""
    found = here(capsys, theirs / "m.safetensors", tmp_path / "run", "--step", "7")
    assert found == (0, f"step 7: 1 tensor, 24 B, under model, in {tmp_path}/run/step-7\n", "")
    live = torch.nn.Module()
    live.w = torch.nn.Parameter(torch.zeros(6))
    restored = aiockpt.blocking.restore(tmp_path / "run", {"model": live})
    assert restored is not None
    assert restored.step == 7
    assert live.w.tolist() == list(range(6))


def test_a_torch_file_for_programs(theirs: Path, tmp_path: Path) -> None:
    """JSON, which needs no rich."""
    done = command(
        "import", theirs / "m.pt", tmp_path / "run", "--step", "7", "--json", code="sys.modules['rich'] = None"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {
        "source": str(theirs / "m.pt"),
        "kind": "torch.save",
        "run": str(tmp_path / "run"),
        "step": 7,
        "path": str(tmp_path / "run" / "step-7"),
        "parts": ["net", "epoch"],
        "tensors": 1,
        "nbytes": 24,
    }
    assert aiockpt.blocking.load(tmp_path / "run")["epoch"] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{theirs}/nowhere", "{tmp}/run", "--step", "0"), "it does not exist"),
        (("{theirs}/text.txt", "{tmp}/run", "--step", "0"), "neither a safetensors nor a torch.save file"),
        (("{theirs}/empty", "{tmp}/run", "--step", "0"), "no safetensors file"),
        (("{theirs}/short.safetensors", "{tmp}/run", "--step", "0"), "its tensors end at"),
        (("{theirs}/module.pt", "{tmp}/run", "--step", "0"), "nothing was executed"),
        (("{theirs}/m.pt", "{theirs}", "--step", "0"), "another program's"),
        (("{theirs}/m.pt", "{theirs}/m.pt", "--step", "0"), "it is a file"),
        (("{theirs}/m.pt", "{tmp}/run", "--step", "-1"), "not a whole number"),
        (("{theirs}/m.pt", "{tmp}/run"), "--step"),
        (("{theirs}/m.pt", "--step", "0"), "RUN"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    theirs: Path, tmp_path: Path, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing is written."""
    before = sorted(os.listdir(theirs))
    status, out, err = here(capsys, *(part.format(tmp=tmp_path, theirs=theirs) for part in arguments))
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert os.listdir(tmp_path) == ["theirs"]
    assert sorted(os.listdir(theirs)) == before


def test_a_step_that_exists(theirs: Path, run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stays; the line says how to go on."""
    before = sorted(os.listdir(run_directory))
    status, out, err = here(capsys, theirs / "m.pt", run_directory, "--step", "5")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "aiockpt rm" in err
    assert sorted(os.listdir(run_directory)) == before
    assert aiockpt.blocking.load(run_directory, step=5)["progress"] == {"step": 5}


def test_without_rich_one_line_says_what_to_install(theirs: Path, tmp_path: Path) -> None:
    """Before anything is read."""
    done = command("import", theirs / "m.pt", tmp_path / "run", "--step", "0", code="sys.modules['rich'] = None")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "pip install 'aiockpt[cli]'" in done.stderr
    assert not (tmp_path / "run").exists()


READING = """
import os, threading
from aiockpt.interchange.foreign_file import ForeignFile
read_through = ForeignFile.read_through
def held(self, on_progress, **options):
    pause = threading.Event()
    on_progress(10)
    while not os.path.exists({gate!r}):
        pause.wait(0.01)
    read_through(self, on_progress, **options)
ForeignFile.read_through = held
"""
SAVING = """
import os, threading
from aiockpt.blocking import Save
result = Save.result
def held(self, timeout=None):
    pause = threading.Event()
    while not os.path.exists({gate!r}):
        pause.wait(0.01)
    return result(self, timeout)
Save.result = held
"""


def test_on_a_terminal(theirs: Path, tmp_path: Path) -> None:
    """A bar while it reads, a word while it saves, and one line at the end."""
    gates = [tmp_path / "read", tmp_path / "saved"]
    code = READING.format(gate=str(gates[0])) + SAVING.format(gate=str(gates[1]))
    with Terminal("import", theirs / "m.pt", tmp_path / "run", "--step", "7", code=code) as terminal:
        terminal.wait_for(lambda: "reading m.pt ━" in terminal.text, "the bar")
        gates[0].touch()
        terminal.wait_for(lambda: "saving step 7" in terminal.text, "the word")
        gates[1].touch()
        assert terminal.finish() == 0
        assert terminal.text.replace("\n", "") == (
            f"step 7: 1 tensor, 24 B, under net, epoch, in {tmp_path}/run/step-7"
        )


def test_ctrl_c_leaves_no_run(theirs: Path, tmp_path: Path) -> None:
    """Nor a traceback."""
    code = READING.format(gate=str(tmp_path / "gate"))
    with Terminal("import", theirs / "m.pt", tmp_path / "run", "--step", "7", code=code) as terminal:
        terminal.wait_for(lambda: "reading m.pt ━" in terminal.text, "the bar")
        terminal.type(b"\x03")
        assert terminal.finish() == 130
        assert "Traceback" not in terminal.text
    assert os.listdir(tmp_path) == ["theirs"]
