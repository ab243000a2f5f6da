"""The demo, small; and that it would notice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import aiockpt.blocking
from aiockpt.cli import demo
from aiockpt.cli.arguments import make_parser
from aiockpt.cli.demo import Run, Story
from aiockpt.cli.demo_trainer import Trainer
from tests.cli.shell import command, on_a_terminal

SMALL = ("demo", "--size", "tiny", "--steps", "12")


def story(**changes: object) -> Story:
    reference = Run(losses={0: "0x1.8p+1", 1: "0x1.8p+0"}, digest="abc")
    saving = Run(losses=dict(reference.losses), digest="abc")
    for name, value in changes.items():
        setattr(saving, name, value)
    return Story(every=1, reference=reference, saving=saving)


def test_equal_runs_have_no_difference() -> None:
    """Losses and final state are all that is compared."""
    assert story().differences() == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"losses": {0: "0x1.8p+1", 1: "0x1.8000000000001p+0"}}, "step 1: loss 1.5 without, 1.5 with the kill"),
        ({"losses": {0: "0x1.8p+1"}}, "step 1: loss 1.5 without, none with the kill"),
        ({"digest": "abd"}, "the final states"),
    ],
)
def test_one_bit_is_a_difference(changes: dict[str, object], said: str) -> None:
    """In a loss, a step that was never trained, the final state."""
    (difference,) = story(**changes).differences()
    assert said in difference


def test_a_step_that_was_trained_twice_must_have_one_loss() -> None:
    """Before the kill and after the restart."""
    run = Run()
    for loss in ("0x1p+0", "0x1p+0", "0x1.1p+0"):
        run.hear({"event": "step", "step": 3, "loss": loss})
    assert run.differing == [3]


@pytest.mark.process
@pytest.mark.timeout(300)
def test_the_demo_is_bit_exact(tmp_path: Path) -> None:
    """Killed in the middle of a save, resumed, equal, without numpy; the run stays where --dir says."""
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text('import sys; sys.modules["numpy"] = None')
    runs = tmp_path / "runs"
    runs.mkdir()
    done = command(*SMALL, "--dir", runs, seconds=280, path=tmp_path / "without")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "SIGKILL after step" in done.stdout
    assert "resumed from step" in done.stdout
    assert "killed here" in done.stdout
    assert "All 12 losses" in done.stdout
    (directory,) = runs.iterdir()
    assert os.listdir(directory) == ["run"]
    assert aiockpt.blocking.steps(directory / "run")[-1] == 11


@pytest.mark.process
@pytest.mark.timeout(300)
def test_a_training_whose_saves_were_over_too_soon_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A demo that heard of every save too late tries anew, and ends as it should."""
    kill, missed = Trainer.kill_while_saving, []

    def too_late(self: Trainer, run: Path, step: int, *, after: float) -> bool:
        if step not in missed:
            missed.append(step)
            return False
        return kill(self, run, step, after=after)

    monkeypatch.setattr(Trainer, "kill_while_saving", too_late)
    assert demo.run(make_parser().parse_args([*map(str, SMALL), "--dir", str(tmp_path)])) == 0
    said = capsys.readouterr().out
    assert said.count("until it is killed") == 2
    assert len(missed) > 1
    assert "All 12 losses" in said


@pytest.mark.process
@pytest.mark.timeout(300)
def test_the_demo_on_a_terminal(tmp_path: Path) -> None:
    """A bar with the loss while it trains, a table at its end, the cursor back."""
    status, text = on_a_terminal(*SMALL, "--dir", tmp_path, seconds=280)
    assert status == 0, text
    for part in ("━", "/24", "loss ", "torch.save", "bit for bit", "\x1b[1;32m"):
        assert part in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "nowhere"), "torch cannot use the device 'nowhere'"),
        (("--dir", "/dev/null/x"), "the demo's directory was not made"),
        (("--steps", "0"), "not a whole number of at least 1"),
        (("--size", "huge"), "invalid choice"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: tuple[str, ...], said: str) -> None:
    """Before anything is trained."""
    done = command("demo", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
