"""An import that fails leaves nothing, and takes away nothing of others."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import aiockpt.blocking
from aiockpt.errors import CheckpointError, ConfigError, StepExistsError
from aiockpt.interchange import importing
from aiockpt.interchange.importing import import_checkpoint
from aiockpt.interchange.new_run import unless_it_fails


@pytest.fixture
def source(tmp_path: Path) -> Path:
    safetensors.torch.save_file({"x": torch.arange(3.0)}, tmp_path / "theirs.safetensors")
    return tmp_path / "theirs.safetensors"


def listed(directory: Path) -> dict[str, Any]:
    """Return every name below a directory, with the content of the files."""
    return {str(path.relative_to(directory)): path.is_file() and path.read_bytes() for path in directory.rglob("*")}


@pytest.mark.process
def test_a_save_that_fails_leaves_no_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the directories above it; here shared memory is not enough."""
    monkeypatch.setattr(importing, "Checkpointer", functools.partial(aiockpt.blocking.Checkpointer, capacity=4096))
    with pytest.raises(CheckpointError, match="capacity"):
        import_checkpoint(str(source), str(tmp_path / "runs" / "a" / "b"), step=0)
    assert os.listdir(tmp_path) == ["theirs.safetensors"]


@pytest.mark.process
def test_an_interrupt_cancels_the_save(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either nothing is left, or the interrupt came too late and all is there."""

    def interrupted(save: Any, timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(aiockpt.blocking.Save, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(str(source), str(tmp_path / "run"), step=0)
    if (tmp_path / "run").exists():
        assert aiockpt.blocking.steps(tmp_path / "run") == [0]
        assert (tmp_path / "run" / "aiockpt.json").exists()
    else:
        assert os.listdir(tmp_path) == ["theirs.safetensors"]


@pytest.mark.process
def test_a_run_that_has_the_step_is_left_as_it_is(source: Path, tmp_path: Path) -> None:
    """Every byte; another step goes in, and is the newest then."""
    run = tmp_path / "run"
    import_checkpoint(str(source), str(run), step=5)
    before = listed(run)
    with pytest.raises(StepExistsError, match="aiockpt rm"):
        import_checkpoint(str(source), str(run), step=5)
    assert listed(run) == before
    import_checkpoint(str(source), str(run), step=3)
    with aiockpt.blocking.Checkpointer(run) as checkpointer:
        assert checkpointer.latest() == 3


@pytest.mark.process
def test_a_run_of_a_running_job_is_left_as_it_is(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One writer at a time."""
    with aiockpt.blocking.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(0, {"x": 1}).result()
        with pytest.raises(ConfigError):
            import_checkpoint(str(source), str(tmp_path / "run"), step=5)
        assert checkpointer.save(1, {"x": 1}).result().step == 1


def test_a_foreign_directory_is_left_as_it_is(source: Path, tmp_path: Path) -> None:
    """It may be another program's."""
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("x")
    for run in (foreign, foreign / "notes.txt", foreign / "notes.txt" / "below"):
        with pytest.raises(CheckpointError):
            import_checkpoint(str(source), str(run), step=0)
    assert os.listdir(foreign) == ["notes.txt"]


def test_what_somebody_else_committed_stays(tmp_path: Path) -> None:
    """In a run that we had made, between our failure and the clearing up."""
    run = tmp_path / "runs" / "mine"
    with pytest.raises(KeyError), unless_it_fails(str(run)):
        (run / "step-1").mkdir(parents=True)
        (run / "aiockpt.json").write_text("{}")
        raise KeyError
    assert sorted(os.listdir(run)) == ["aiockpt.json", "step-1"]


def test_what_somebody_else_put_there_stays(tmp_path: Path) -> None:
    """Only what an opened run has of its own goes."""
    run = tmp_path / "runs" / "mine"
    with pytest.raises(KeyError), unless_it_fails(str(run)):
        run.mkdir(parents=True)
        for name in ("aiockpt.json", ".lock", ".term-1", "notes.txt"):
            (run / name).write_text("x")
        raise KeyError
    assert os.listdir(run) == ["notes.txt"]
