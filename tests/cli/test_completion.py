"""Shell completion: what the tab key offers, and that bash gets it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.shell import SECONDS, command
from tests.restoring.writing import write_step

pytestmark = pytest.mark.process

LIGHT = "for name in ('torch', 'numpy', 'rich', 'anyio', 'aiockpt.cli.inspect'): sys.modules[name] = None\n"
"""What completion has no time to import."""


def offered(line: str, tmp_path: Path) -> list[str]:
    """Return what is offered behind a line, as argcomplete's shell function asks for it."""
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    done = command(code=f"import os\nos.environ |= {asked!r}\n{LIGHT}")
    assert (done.returncode, done.stdout) == (0, "")
    return answer.read_text().split("\n")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (5, 100, 120):
        write_step(tmp_path / "runs" / "exp1", step, {"x": 1})
    (tmp_path / "runs" / "note.txt").write_text("x")
    return tmp_path / "runs" / "exp1"


def test_commands_and_options(tmp_path: Path) -> None:
    """By their beginnings."""
    assert {"ls", "inspect", "diff", "verify", "rm", "demo"} <= set(offered("aiockpt ", tmp_path))
    assert offered("aiockpt ins", tmp_path) == ["inspect"]
    assert {"--step", "--tensors", "--json"} <= set(offered("aiockpt inspect --", tmp_path))
    assert offered("aiockpt spawn --numa-binding ex", tmp_path) == ["exclusive"]


def test_runs_are_directories(run: Path, tmp_path: Path) -> None:
    """Files are none, and a run's steps are directories too."""
    assert offered(f"aiockpt inspect {tmp_path}/runs/", tmp_path) == [f"{run}/"]
    assert f"{run}/step-5/" in offered(f"aiockpt verify {run}/st", tmp_path)


def test_programs_and_places_of_spawn(run: Path, tmp_path: Path) -> None:
    """Log directories, and files for the program and its arguments."""
    assert offered(f"aiockpt spawn --log-dir {tmp_path}/ru", tmp_path) == [f"{tmp_path}/runs/"]
    assert set(offered(f"aiockpt spawn -n 2 -- python {tmp_path}/runs/", tmp_path)) == {
        f"{run}/",
        f"{tmp_path}/runs/note.txt",
    }


@pytest.mark.parametrize("words", ["inspect {run} --step ", "verify {run} --step ", "rm {run} ", "diff {run} 5 "])
def test_steps_are_those_of_the_run(run: Path, tmp_path: Path, words: str) -> None:
    """Wherever a step is typed."""
    line = "aiockpt " + words.format(run=run)
    assert set(offered(line, tmp_path)) == {"5", "100", "120"}
    assert set(offered(f"{line}1", tmp_path)) == {"100", "120"}


@pytest.mark.parametrize("line", ["aiockpt inspect {tmp}/none --step ", "aiockpt inspect {tmp} --tensors "])
def test_where_nothing_can_be_offered(tmp_path: Path, line: str) -> None:
    """A run that is none, a pattern: nothing, and no error."""
    assert offered(line.format(tmp=tmp_path), tmp_path) == [""]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_with_the_documented_line(run: Path, tmp_path: Path) -> None:
    """As docs/command-line.md has it: register-python-argcomplete once, and the function answers."""
    program = tmp_path / "bin" / "aiockpt"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport sys\nfrom aiockpt.cli.main import main\nsys.exit(main())\n")
    program.chmod(0o755)
    script = f"""
        eval "$({sys.executable} -m argcomplete.scripts.register_python_argcomplete aiockpt)"
        words="$(complete -p aiockpt)"
        COMP_WORDS=(aiockpt inspect {run} --step 1)
        COMP_LINE="${{COMP_WORDS[*]}}"
        COMP_POINT=${{#COMP_LINE}} COMP_CWORD=4 COMP_TYPE=9
        "$(sed 's/.*-F \\([^ ]*\\).*/\\1/' <<< "$words")" aiockpt 1 --step
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=SECONDS, env=environment, check=False
    )
    assert sorted(done.stdout.split()) == ["100", "120"], done.stderr
