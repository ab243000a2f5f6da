"""The recipe for transformers: a Trainer that is cut and resumed ends like one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aiockpt import blocking
from tests.recipes.reader import Reader, interruption
from tests.state.rebuild import same

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [
    pytest.mark.process,
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # the Trainer's default
]

STEPS = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
"""What the log history says of a step; at the end it tells of time as well."""


def outcome(reader: Reader) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the last checkpoint without the Trainer's counters, and what the Trainer logged of each step."""
    found = blocking.load(reader.folder / "runs/llama")
    counters = json.loads(found.pop("trainer"))
    return found, [entry for entry in counters["log_history"] if entry.keys() <= STEPS]


def test_a_trainer_that_was_cut_ends_like_one_that_was_not(tmp_path: Path) -> None:
    """Cut in the middle of an epoch, and behind a checkpoint at the end of one; six steps are one epoch."""
    whole, cut = Reader(tmp_path / "whole"), Reader(tmp_path / "cut")
    whole.run("transformers_train.py")
    cut.run_interrupted("transformers_train.py", after=7)  # saved: 4
    cut.run_interrupted("transformers_train.py", after=10)  # from 4, saved: 8 and 12
    assert blocking.steps(cut.folder / "runs/llama") == [4, 8, 12]
    cut.run("transformers_train.py")
    expected, logged = outcome(whole)
    assert len(logged) == 18
    assert same(outcome(cut), (expected, logged))
    assert blocking.steps(cut.folder / "runs/llama") == blocking.steps(whole.folder / "runs/llama") == [12, 16, 18]
    model = transformers.AutoModelForCausalLM.from_pretrained(cut.folder / "runs/llama/step-18/model")
    assert same({name: tensor.data for name, tensor in model.named_parameters()}, _parameters(expected))


def _parameters(found: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in found["model"].items() if "rotary" not in name}


def test_a_directory_of_the_trainer_is_brought_over(tmp_path: Path) -> None:
    """It goes on behind the Trainer's own checkpoint, and ends like a Trainer that was never stopped."""
    whole, moved = Reader(tmp_path / "whole"), Reader(tmp_path / "moved")
    whole.run("transformers_train.py")
    with moved.inside():
        from language_model import arguments, build_llama  # type: ignore[import-not-found]  # the reader's

        model, texts = build_llama()
        with interruption(after=9):  # saved: 4 and 8
            transformers.Trainer(model, arguments, train_dataset=texts).train()
    moved.run("transformers_bring.py")
    assert blocking.steps(moved.folder / "runs/llama") == [12, 16, 18]
    assert same(outcome(moved)[0]["model"], outcome(whole)[0]["model"])
