"""The recipes that are loops: they run, and a second run goes on exactly where the first one ended."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
from torchdata import stateful_dataloader

import aiockpt
from aiockpt import blocking
from aiockpt.config import Every
from tests.recipes.reader import FILES, MODULES, Reader
from tests.state.rebuild import same

pytestmark = pytest.mark.process

EXACT = {
    "classic.py": ("runs/classic", [9, 19, 29]),
    "resume.py": ("runs/resume", [19, 24, 29]),
    "ema.py": ("runs/ema", [9, 19, 29]),
    "amp.py": ("runs/amp", [9, 19, 29]),
    "data_loader.py": ("runs/data", [6, 13, 20, 27]),
}
"""Their run, and the steps that it ends with."""


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata's own
def test_a_run_that_was_cut_ends_like_one_that_was_not(name: str, tmp_path: Path) -> None:
    """Every tensor, value and random number of the last checkpoint is the same, bit for bit."""
    run, steps = EXACT[name]
    whole, cut = Reader(tmp_path / "whole"), Reader(tmp_path / "cut")
    whole.run(name)
    cut.run_interrupted(name, after=17)
    assert blocking.steps(cut.folder / run)[-1] < 17
    cut.run(name)
    assert blocking.steps(whole.folder / run) == blocking.steps(cut.folder / run) == steps
    assert same(blocking.load(whole.folder / run), blocking.load(cut.folder / run))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata's own
def test_a_data_loader_with_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It resumes as exactly; its workers are forked while the run is open."""
    with_workers = functools.partial(stateful_dataloader.StatefulDataLoader, num_workers=2)
    monkeypatch.setattr(stateful_dataloader, "StatefulDataLoader", with_workers)
    whole, cut = Reader(tmp_path / "whole"), Reader(tmp_path / "cut")
    whole.run("data_loader.py")
    cut.run_interrupted("data_loader.py", after=17)
    cut.run("data_loader.py")
    assert same(blocking.load(whole.folder / "runs/data"), blocking.load(cut.folder / "runs/data"))


def test_an_average_that_is_swapped_in_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    """The weights of each checkpoint are those of a training that never swaps."""
    reader = Reader(tmp_path / "reader")
    reader.run("ema.py")
    with reader.inside():
        import training  # type: ignore[import-not-found]  # the reader's

        model, optimizer = training.build()
        for step in range(training.STEPS):
            training.train_step(model, optimizer)
            if (step + 1) % 10 == 0:
                assert same(blocking.load("runs/ema", step=step, include="model.*")["model"], dict(model.state_dict()))


def test_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes, here one millisecond, after the save before; and once more at the end."""
    monkeypatch.setattr(aiockpt, "Every", lambda *, minutes: Every(minutes=minutes / 600_000))
    reader = Reader(tmp_path / "reader", steps=6)
    reader.run("minutes.py")
    run = reader.folder / "runs/minutes"
    steps = blocking.steps(run)
    assert len(steps) > 1
    assert steps[-1] == 5
    reasons = [blocking.restore(run, {}, step=step, strict=False).metadata["reason"] for step in steps]
    assert all(re.fullmatch(r"every .* minutes", reason) for reason in reasons[:-1])


def test_a_sweep_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each trial has a run of its own; started again, the finished ones only tell their result."""
    reader = Reader(tmp_path / "reader")
    reader.run("sweep.py")
    said = capsys.readouterr().out
    assert said.startswith("best learning rate: 0.00")
    assert {path.name: blocking.steps(path) for path in (reader.folder / "runs/sweep").iterdir()} == {
        f"lr-{lr}": [29] for lr in (1e-4, 1e-3, 1e-2)
    }
    reader.run("sweep.py")
    assert capsys.readouterr().out == said


def test_every_file_of_the_pages_is_run() -> None:
    """A recipe without a test is none; some are imported by others."""
    here = Path(__file__).parent
    tests = "".join(path.read_text() for path in [*here.glob("test_*.py"), here.parent / "elastic" / "test_docs.py"])
    assert {name for name in FILES if f'"{name}"' not in tests} <= {f"{module}.py" for module in MODULES}
