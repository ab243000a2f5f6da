"""inspect as a shell sees it: what it says, JSON, what it refuses, what it imports."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import aiockpt.blocking
from aiockpt.format.manifest import decode_manifest, encode_manifest
from tests.cli.shell import command
from tests.restoring.writing import write_step

pytestmark = pytest.mark.process


def test_for_programs_everything_is_there(trained_run: Path) -> None:
    """Identity, files, and each tensor with the place where its bytes are."""
    done = command("inspect", trained_run, "--json", code="sys.modules['rich'] = sys.modules['torch'] = None")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["step"], found["ordinal"], found["term"], found["world_size"]) == (200, 2, 1, 1)
    assert found["path"] == str(trained_run / "step-200")
    assert found["metadata"] == {"loss": 25.0}
    assert {"name": "progress.step", "value": 200} in found["values"]
    assert sum(file["tensors"] for file in found["files"]) == 87
    state = aiockpt.blocking.load(trained_run)
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    for name, tensor in state["model"].items():
        record = by_name[f"model.{name}"]
        data = (trained_run / "step-200" / record["file"]).read_bytes()[record["start"] : record["stop"]]
        assert torch.equal(torch.frombuffer(bytearray(data), dtype=tensor.dtype).reshape(record["shape"]), tensor)
        assert getattr(torch, record["dtype"]) is tensor.dtype
    assert by_name["model.head.weight"]["same_as"] == "model.tokens.weight"


def test_globs_choose_for_programs_too(trained_run: Path) -> None:
    """Tensors and values, by the rules of include."""
    found = json.loads(command("inspect", trained_run, "--json", "--tensors", "data", "--tensors", "*.step").stdout)
    assert {tensor["name"].rpartition(".")[2] for tensor in found["tensors"]} == {"order", "seen", "step"}
    assert found["values"] == [{"name": "progress.step", "value": 200}]


def test_an_older_step_and_a_directory_of_one(trained_run: Path) -> None:
    """--step, or the step's own directory, wherever it was copied to."""
    older = command("inspect", trained_run, "--step", "100").stdout.splitlines()
    assert older[0] == f"step 100 of {trained_run}, 1 newer of 2"
    alone = command("inspect", trained_run / "step-100").stdout.splitlines()
    assert alone[0] == f"step 100 of {trained_run / 'step-100'}, the newest"
    assert alone[1:] == older[1:]


def test_a_copy_with_another_name(trained_run: Path, tmp_path: Path) -> None:
    """What its manifest says counts."""
    shutil.copytree(trained_run / "step-100", tmp_path / "best")
    assert json.loads(command("inspect", tmp_path / "best", "--json").stdout)["step"] == 100
    assert command("verify", tmp_path / "best").stdout.startswith("step 100: good")


def test_no_torch_and_no_data_is_read(trained_run: Path) -> None:
    """It starts at once, and takes no longer for a large checkpoint."""
    code = (
        "sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from aiockpt.storage.file_reader import FileReader\nFileReader.read_block = None"
    )
    for more in ((), ("--tensors", "*"), ("--json",)):
        done = command("inspect", trained_run, *more, code=code)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{tmp}/nowhere",), "it does not exist"),
        (("{tmp}/file",), "file"),
        (("{tmp}/empty",), "neither aiockpt.json nor a checkpoint"),
        (("{run}", "--step", "7"), "it has 100, 200"),
        (("{run}", "--step", "-1"), "not a whole number"),
        (("{run}", "--step", "9223372036854775808"), "not a whole number"),
        (("{run}", "--tensors", "modle.*"), "'modle.*'"),
        (("{run}", "--tensors", "model", "--tensors", "none"), "'none'"),
        (("{run}", "--tensors", ""), "is no pattern"),
        (("{run}", "--tensors", "progress"), "what has this name is a value"),
        (("{run}/step-100", "--step", "200"), "it has 100"),
        (("{tmp}/none-yet",), "has no checkpoint"),
        (("{tmp}/step-5",), "it does not exist"),
        (("{tmp}/damaged/step-3",), "it has no manifest.json"),
        (("{tmp}/renamed/step-3",), "its manifest is that of step 100"),
        ((), "RUN"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    trained_run: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    """Whatever is wrong with what was typed."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "none-yet").mkdir()
    shutil.copy(trained_run / "aiockpt.json", tmp_path / "none-yet")
    (tmp_path / "damaged" / "step-3").mkdir(parents=True)
    (tmp_path / "renamed" / "step-3").mkdir(parents=True)
    shutil.copy(trained_run / "step-100" / "manifest.json", tmp_path / "renamed" / "step-3")
    done = command("inspect", *(part.format(tmp=tmp_path, run=trained_run) for part in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_damaged_header_is_named(trained_run: Path, tmp_path: Path) -> None:
    """Where the place of tensors is asked for; the tree needs none."""
    shutil.copytree(trained_run, tmp_path / "run")
    file = tmp_path / "run" / "step-200" / "data" / "model-00001-of-00001.safetensors"
    with file.open("r+b") as opened:
        opened.seek(100)
        opened.write(b"?")
    assert command("inspect", tmp_path / "run").returncode == 0
    done = command("inspect", tmp_path / "run", "--tensors", "data")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{file} is damaged at byte 0" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_tree_without_end_is_one_line_and_status_2(tmp_path: Path) -> None:
    """A manifest that is damaged so that its sums fit, or that somebody made."""
    manifest = write_step(tmp_path / "run", 1, {"w": torch.ones(2)}) / "manifest.json"
    decoded = decode_manifest(manifest.read_bytes(), file="")
    tree: Any = 0
    for _ in range(800):
        tree = {"a": tree, "b": 0}
    plan = msgspec.json.encode(msgspec.structs.replace(decoded.plan, tree=tree))
    manifest.write_bytes(encode_manifest(decoded.head, decoded.files, values=b"[]", metadata=b"null", plan=plan))
    done = command("inspect", tmp_path / "run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "aiockpt: the checkpoint is nested too deep to be shown; look at another one\n"


def test_it_holds_retention_off(trained_run: Path, tmp_path: Path) -> None:
    """A checkpoint that is looked at is not removed meanwhile."""
    shutil.copytree(trained_run, tmp_path / "run")
    code = (
        "import aiockpt.cli.inspect as inspect\nfrom aiockpt.cli.main import main\n"
        "inspect.show_tree = lambda *a, **k: print('rm:', main(['rm', sys.argv[2], '200']))"
    )
    done = command("inspect", tmp_path / "run", code=code)
    assert done.stdout == "rm: 2\n"
    assert "somebody is reading it" in done.stderr
    assert os.path.exists(tmp_path / "run" / "step-200" / "manifest.json")


def test_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    """Control characters in names, values and metadata are shown, not sent."""
    state = {"a\x1b]0;title\x07": torch.ones(2), "text": "\x1b[31m\nred", "na\u202eme": {"\x9b1m": torch.ones(1)}}
    write_step(tmp_path / "run", 1, state, metadata={"\x1b[2J": "\x1b[3J"})
    for more in ((), ("--tensors", "*")):
        done = command("inspect", tmp_path / "run", *more)
        assert done.returncode == 0
        assert not [c for c in done.stdout if not c.isprintable() and c != "\n"]
        assert "a\\x1b]0;title\\x07" in done.stdout
    done = command("inspect", tmp_path / "run", "--tensors", "\x1b[5m")
    assert "\x1b" not in done.stderr
