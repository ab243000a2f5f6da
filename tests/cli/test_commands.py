"""ls, verify and rm as a shell sees them: output, exit status, what they import."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import aiockpt
from aiockpt.storage.readers import open_checkpoint
from tests.cli.shell import command, on_a_terminal
from tests.restoring.writing import write_step

pytestmark = pytest.mark.process

WITHOUT_RICH = "sys.modules['rich'] = None"


def tensor_file(run: Path, step: int) -> Path:
    (file,) = (run / f"step-{step}").glob("model/*.safetensors")
    return file


def flip(file: Path, offset: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)
        opened.seek(offset)
        opened.write(bytes([byte[0] ^ 1]))


def test_version() -> None:
    """The package's, and nothing else."""
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"aiockpt {aiockpt.__version__}\n")


def test_ls_lists_the_newest_first(run_directory: Path) -> None:
    """For people: one line a step, then the sum."""
    done = command("ls", run_directory)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["step", "10", "5", "0", "3"]
    assert "newest" in done.stdout.splitlines()[1]
    assert "3 checkpoints, 3.44 MiB" in done.stdout


def test_ls_for_programs(run_directory: Path) -> None:
    """JSON with what identifies each checkpoint."""
    listing = json.loads(command("ls", run_directory, "--json").stdout)
    assert listing["run"] == str(run_directory)
    assert listing["run_id"] == json.loads((run_directory / "aiockpt.json").read_text())["run_id"]
    assert [entry["step"] for entry in listing["checkpoints"]] == [10, 5, 0]
    assert [entry["ordinal"] for entry in listing["checkpoints"]] == [3, 2, 1]
    assert listing["checkpoints"][0]["path"] == str(run_directory / "step-10")
    assert (listing["damaged"], listing["bad"]) == ([], [])


def test_ls_shows_what_is_damaged_and_what_was_put_aside(run_directory: Path) -> None:
    """A step without a manifest, and one that a restore renamed."""
    (run_directory / "step-5" / "manifest.json").unlink()
    os.rename(run_directory / "step-0", run_directory / ".bad-step-0.0123abcd")
    done = command("ls", run_directory)
    assert done.returncode == 0
    assert "damaged: step-5: it has no manifest.json" in done.stdout
    assert "put aside as bad: .bad-step-0.0123abcd" in done.stdout
    listing = json.loads(command("ls", run_directory, "--json").stdout)
    assert [entry["step"] for entry in listing["damaged"] + listing["bad"]] == [5, 0]


def test_ls_of_a_long_run(tmp_path: Path) -> None:
    """The newest fifty, and how many there are more; all of them where that is asked for, or a program asks."""
    run = tmp_path / "run"
    for step in range(0, 550, 10):
        write_step(run, step, {"x": step})
    shown = command("ls", run).stdout.splitlines()
    assert shown[1].split()[0] == "540"
    assert shown[51:] == ["… 5 older, to step 0: --all lists them", f"55 checkpoints, 0 B, in {run}"]
    assert len(command("ls", run, "--all").stdout.splitlines()) == 57
    assert len(json.loads(command("ls", run, "--json").stdout)["checkpoints"]) == 55


def test_verify_takes_the_newest(run_directory: Path) -> None:
    """And says how much was read."""
    done = command("verify", run_directory)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("step 10: good, 1.15 MiB at ")


def test_verify_all(run_directory: Path) -> None:
    """In the order of the steps."""
    report = json.loads(command("verify", run_directory, "--all", "--json").stdout)
    assert report["ok"] is True
    assert [(entry["step"], entry["ok"]) for entry in report["checkpoints"]] == [(0, True), (5, True), (10, True)]


def test_verify_of_one_directory(run_directory: Path) -> None:
    """A step by its own path; what has lost its manifest is bad, not missing."""
    report = json.loads(command("verify", run_directory / "step-5", "--json").stdout)
    assert (report["ok"], [entry["step"] for entry in report["checkpoints"]]) == (True, [5])
    (run_directory / "step-5" / "manifest.json").unlink()
    done = command("verify", run_directory / "step-5")
    assert (done.returncode, done.stdout) == (1, "step 5: BAD: manifest.json: it has no manifest.json\n")


def test_verify_names_the_bad_file_and_offset(run_directory: Path) -> None:
    """Exit status 1; the other steps are looked at all the same."""
    file = tensor_file(run_directory, 5)
    flip(file, file.stat().st_size - 1)
    done = command("verify", run_directory, "--all")
    assert done.returncode == 1
    assert done.stdout.endswith("3 checkpoints, 1 BAD\n")
    assert "step 5: BAD: model/model-00001-of-00001.safetensors, offset 4096: " in done.stdout
    assert "step 10: good" in done.stdout
    report = json.loads(command("verify", run_directory, "--step", "5", "--json").stdout)
    assert report["ok"] is False
    (verdict,) = report["checkpoints"]
    assert (verdict["file"], verdict["offset"]) == (str(file), 4096)
    assert verdict["expected"] != verdict["found"]


@pytest.mark.parametrize("damage", ["missing", "short", "no manifest"])
def test_verify_finds_lost_bytes(run_directory: Path, damage: str) -> None:
    """A file that is missing or cut, and a manifest that is not there: status 1 without any option."""
    file = tensor_file(run_directory, 10)
    match damage:
        case "missing":
            file.unlink()
        case "short":
            os.truncate(file, 5000)
        case _:
            file = run_directory / "step-10" / "manifest.json"
            file.unlink()
    done = command("verify", run_directory)
    assert done.returncode == 1
    assert f"step 10: BAD: {file.relative_to(run_directory / 'step-10')}" in done.stdout


def test_rm_removes_one_step(run_directory: Path) -> None:
    """Its directory is gone, nothing is left of it, the others stand."""
    done = command("rm", run_directory, "5")
    assert (done.returncode, done.stdout) == (0, "removed step-5\n")
    assert aiockpt.blocking.steps(run_directory) == [0, 10]
    assert not [name for name in os.listdir(run_directory) if name.startswith(".trash")]


def test_rm_leaves_what_is_being_read(run_directory: Path) -> None:
    """Status 2 and one line that says so; afterwards it may go."""
    with open_checkpoint(str(run_directory / "step-5")):
        done = command("rm", run_directory, "5")
        assert done.returncode == 2
        assert "somebody is reading it" in done.stderr
        assert (run_directory / "step-5" / "manifest.json").exists()
    assert json.loads(command("rm", run_directory, "5", "--json").stdout)["removed"] == ["step-5"]


def test_rm_beside_a_running_job(run_directory: Path) -> None:
    """A full disk is cleared without ending the job, which goes on saving."""
    with aiockpt.blocking.Checkpointer(run_directory) as checkpointer:
        assert command("rm", run_directory, "5").returncode == 0
        assert checkpointer.save(11, {"progress": {"step": 11}}).result().step == 11
        assert checkpointer.steps() == [0, 10, 11]


def test_rm_of_damaged_and_bad_ones(run_directory: Path) -> None:
    """A step without a manifest goes like any other; what a restore put aside goes with --bad, and only that."""
    (run_directory / "step-5" / "manifest.json").unlink()
    os.rename(run_directory / "step-0", run_directory / ".bad-step-10.0123abcd")
    assert command("rm", run_directory, "5").returncode == 0
    assert command("rm", run_directory, "10", "--bad").stdout == "removed .bad-step-10.0123abcd\n"
    assert sorted(name for name in os.listdir(run_directory) if "step" in name) == ["step-10"]
    assert command("rm", run_directory, "10", "--bad").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ls", "{tmp}/nowhere"), "it does not exist"),
        (("ls", "{tmp}/file"), "file"),
        (("ls", "{tmp}/foreign"), "neither aiockpt.json nor a checkpoint"),
        (("ls", "{tmp}/newer"), "upgrade aiockpt"),
        (("ls", "{run}/step-5"), 'it is one checkpoint: look with "aiockpt inspect'),
        (("verify", "{tmp}/nowhere"), "it does not exist"),
        (("verify", "{run}", "--step", "7"), "it has 0, 5, 10"),
        (("verify", "{run}", "--step", "-1"), "not a whole number"),
        (("verify", "{run}", "--step", "1", "--all"), "not allowed with"),
        (("rm", "{run}", "7"), "has no step 7"),
        (("rm", "{run}", "newest"), "not a whole number"),
        (("rm", "{run}", "\u0661"), "not a whole number"),
        (("rm", "{run}"), "STEP"),
        (("frobnicate",), "invalid choice"),
        ((), "COMMAND"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    run_directory: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    """Whatever is wrong with what was typed."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("x")
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "aiockpt.json").write_text('{"format": 999, "run_id": "x"}')
    done = command(*(part.format(tmp=tmp_path, run=run_directory) for part in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    """ls shows that there is none; verify has nothing to say yes to."""
    with aiockpt.blocking.Checkpointer(tmp_path / "run"):
        pass
    assert command("ls", tmp_path / "run").stdout == f"0 checkpoints, 0 B, in {tmp_path / 'run'}\n"
    assert command("verify", tmp_path / "run").returncode == 2


@pytest.mark.parametrize("arguments", [("ls",), ("inspect",), ("diff", "0", "5"), ("verify",), ("rm", "5"), ("demo",)])
def test_without_rich_one_line_says_what_to_install(run_directory: Path, arguments: tuple[str, ...]) -> None:
    """Before anything is done: rm has removed nothing."""
    name, *rest = arguments
    done = command(name, *([] if name == "demo" else [run_directory]), *rest, code=WITHOUT_RICH)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "pip install 'aiockpt[cli]'" in done.stderr
    assert aiockpt.blocking.steps(run_directory) == [0, 5, 10]


@pytest.mark.parametrize("arguments", [("ls",), ("verify",), ("rm", "5")])
def test_json_needs_no_rich(run_directory: Path, arguments: tuple[str, ...]) -> None:
    """Programs install no extra."""
    name, *rest = arguments
    done = command(name, run_directory, *rest, "--json", code=WITHOUT_RICH)
    assert (done.returncode, done.stderr) == (0, "")
    json.loads(done.stdout)


@pytest.mark.parametrize("arguments", [("ls",), ("verify", "--all"), ("rm", "5")])
def test_no_command_imports_torch(run_directory: Path, arguments: tuple[str, ...]) -> None:
    """They start at once, and on machines without it."""
    name, *rest = arguments
    done = command(name, run_directory, *rest, code="sys.modules['torch'] = sys.modules['numpy'] = None")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_pipe_is_no_error(run_directory: Path) -> None:
    """As in ``aiockpt ls RUN | head -0``."""
    done = command("ls", run_directory, "--json", code="import os; r, w = os.pipe(); os.close(r); os.dup2(w, 1)")
    assert done.stderr == ""
    assert done.returncode == 141


def test_ls_on_a_terminal(run_directory: Path) -> None:
    """Colours and columns, no line longer than the terminal."""
    status, text = on_a_terminal("ls", run_directory)
    assert status == 0
    assert "\x1b[1m" in text
    assert "newest" in text
    assert "3 checkpoints" in text


def test_verify_on_a_terminal_shows_a_bar(run_directory: Path) -> None:
    """A bar with bytes while it reads, which leaves with it; then the verdict in green."""
    status, text = on_a_terminal("verify", run_directory, "--all")
    assert status == 0
    assert "━" in text
    assert "/s" in text
    assert "\x1b[?25h" in text  # the cursor is back
    assert [line for line in text.splitlines() if "step 10: good" in line]
    assert "\x1b[32m" in text


def test_verify_on_a_terminal_shows_damage_in_red(run_directory: Path) -> None:
    """Status 1."""
    flip(tensor_file(run_directory, 10), 4096)
    status, text = on_a_terminal("verify", run_directory)
    assert status == 1
    assert "\x1b[31m" in text
    assert "BAD" in text
