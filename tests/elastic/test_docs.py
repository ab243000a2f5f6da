"""docs/elastic.md, and what docs/migration.md says of torch's module: it runs, and it names what is there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import aiockpt.elastic
from tests.markdown import files
from tests.support import ROOT
from tests.waiting import PATIENCE_SECONDS

PAGE = ROOT / "docs" / "elastic.md"


def run(name: str, folder: Path, page: str) -> str:
    """Paste the files of a page into a folder and run one of them."""
    for title, block in files(page).items():
        (folder / title).write_text(block.code)
    if page != "docs/elastic.md":
        (folder / "training.py").write_text(files("docs/recipes.md")["training.py"].code)
    done = subprocess.run(
        [sys.executable, name],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.process
def test_the_first_screen(tmp_path: Path) -> None:
    """Output has its prefixes, and values come back by rank."""
    said = run("supervise.py", tmp_path, "docs/elastic.md").splitlines()
    assert sorted(said[:2]) == ["[trainer0]:training 100 steps", "[trainer1]:training 100 steps"]
    assert said[2:] == ["{0: 0, 1: 100}"]


@pytest.mark.process
def test_the_blocking_face_with_a_program(tmp_path: Path) -> None:
    """Each has its own environment, and the console as it is, where two lines may meet."""
    assert sorted(run("programs.py", tmp_path, "docs/elastic.md").replace("\n", "")) == ["0", "1"]


@pytest.mark.process
@pytest.mark.timeout(120)
def test_both_sides_of_the_migration(tmp_path: Path) -> None:
    """Torch's module and ours train the same, with the same values at the end."""
    sides = ("torch_elastic_before.py", "torch_elastic_after.py")
    values = [ast.literal_eval(run(side, tmp_path, "docs/migration.md").splitlines()[-1]) for side in sides]
    assert values[0] == values[1]
    assert {rank: len(losses) for rank, losses in values[1].items()} == {0: 3, 1: 4}


def test_every_name_is_on_the_page() -> None:
    """In the prose or in the table beside torch's names."""
    text = PAGE.read_text()
    own = {"OutputStatistics", "ProcessStatistics", "Unreaped", "Cause", "load_logs_specs"}  # what calls return
    assert [name for name in aiockpt.elastic.__all__ if name not in own and not re.search(rf"\b{name}\b", text)] == []
