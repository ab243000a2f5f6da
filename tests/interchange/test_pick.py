"""What of a checkpoint goes out, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest
import safetensors.torch
import torch
from torch import nn

from aiockpt.errors import CheckpointCorruptError, ConfigError
from aiockpt.interchange.exporting import Exported, export_checkpoint
from tests.restoring.writing import rewrite_manifest, write_step

STATE: dict[str, Any] = {
    "nets": {"actor": nn.Linear(2, 3), "critic": {"head": torch.ones(2), "a.b": torch.zeros(3)}},
    "buffers": [torch.arange(2), (torch.arange(3), "text")],
    5: {"x": torch.ones(4)},
    "epoch": 3,
    "lone": torch.ones(1),
}


def exported(tmp_path: Path, **options: Any) -> tuple[set[str], Exported]:
    """Return the names in the file, and the report."""
    step = write_step(tmp_path / "run", 1, STATE)
    found = export_checkpoint(str(step), str(tmp_path / "m.safetensors"), **options)
    return set(safetensors.torch.load_file(tmp_path / "m.safetensors")), found


def test_everything(tmp_path: Path) -> None:
    """Under full dotted names, whatever the keys and containers are."""
    names, found = exported(tmp_path)
    assert names == {
        "nets.actor.weight",
        "nets.actor.bias",
        "nets.critic.head",
        "nets.critic.a.b",
        "buffers.0",
        "buffers.1.0",
        "5.x",
        "lone",
    }
    assert found.values_left_out == 2


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("nets.actor", {"weight", "bias"}),
        ("nets", {"actor.weight", "actor.bias", "critic.head", "critic.a.b"}),
        ("nets.critic", {"head", "a.b"}),
        ("buffers", {"0", "1.0"}),
        ("buffers.1", {"0"}),
        ("5", {"x"}),
    ],
)
def test_a_part(part: str, expected: set[str], tmp_path: Path) -> None:
    """By its dotted name, at any depth."""
    assert exported(tmp_path, part=part)[0] == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tensors": "*.weight"}, {"nets.actor.weight"}),
        ({"tensors": ["lone", "buffers.1"]}, {"lone", "buffers.1.0"}),
        ({"tensors": "nets.*", "part": "nets.actor"}, {"weight", "bias"}),
        ({"tensors": "*.bias", "part": "nets"}, {"actor.bias"}),
    ],
)
def test_globs(options: dict[str, Any], expected: set[str], tmp_path: Path) -> None:
    """Of the names in the whole state."""
    assert exported(tmp_path, **options)[0] == expected


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"part": "model"}, "has no part 'model'"),
        ({"part": "nets.act"}, "has no part 'nets.act'"),
        ({"part": ""}, "has no part ''"),
        ({"part": "epoch"}, "no tensor to export"),
        ({"part": "lone"}, "no tensor to export"),
        ({"tensors": "epoch"}, "no tensor to export"),
        ({"tensors": "model.*"}, "nothing is named 'model."),
        ({"tensors": ["lone", "nope"]}, "nothing is named 'nope'"),
        ({"tensors": ""}, "is no pattern"),
        ({"tensors": "lone", "part": "nets"}, "no tensor to export"),
    ],
)
@pytest.mark.parametrize("target", ["set", "m.safetensors"])
def test_what_fits_nothing(target: str, options: dict[str, Any], why: str, tmp_path: Path) -> None:
    """One error; nothing is written."""
    step = write_step(tmp_path / "run", 1, STATE)
    with pytest.raises(ConfigError, match=why):
        export_checkpoint(str(step), str(tmp_path / target), **options)
    assert not (tmp_path / target).exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"part": "epoch"}, "3"),
        ({"part": "lone"}, "tensor([1.])"),
        ({"part": "buffers.1"}, "(tensor([0, 1, 2]), 'text')"),
        ({"tensors": ["epoch", "5"]}, "{5: {'x': tensor([1., 1., 1., 1.])}, 'epoch': 3}"),
    ],
)
def test_parts_of_a_torch_file(options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    """A part may be a value there; what is below it keeps its containers."""
    step = write_step(tmp_path / "run", 1, STATE)
    export_checkpoint(str(step), str(tmp_path / "m.pt"), **options)
    assert repr(torch.load(tmp_path / "m.pt", weights_only=True)) == expected


@pytest.mark.parametrize("target", ["set", "m.pt"])
@pytest.mark.parametrize("depth", [150, 300, 600, 900, 3000])
def test_a_hostile_tree_is_a_bad_checkpoint_at_most(target: str, depth: int, tmp_path: Path) -> None:
    """Deeper than any that a save makes, with checksums that fit."""
    step = write_step(tmp_path / "run", 1, {"x": torch.ones(1)})
    tree: Any = msgspec.Raw(b'{"x":' * depth + b"0" + b"}" * depth)
    rewrite_manifest(step, plan={"tree": tree})
    try:
        export_checkpoint(str(step), str(tmp_path / target))
    except CheckpointCorruptError:
        assert not (tmp_path / target).exists()


def test_a_name_that_safetensors_has_for_itself(tmp_path: Path) -> None:
    """It stands only where nothing is in front of it."""
    step = write_step(tmp_path / "run", 1, {"a": {"b": {"__metadata__": torch.ones(1)}}})
    with pytest.raises(ConfigError, match="for itself"):
        export_checkpoint(str(step), str(tmp_path / "m.safetensors"), part="a.b")


def test_a_header_that_no_reader_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single file is refused; a directory has another file for the rest."""
    step = write_step(tmp_path / "run", 1, {"model": {f"{i}": torch.ones(1) for i in range(100)}})
    with monkeypatch.context() as patch:
        patch.setattr("aiockpt.interchange.write_safetensors.lay_out", refuse_header)
        with pytest.raises(ConfigError, match="export to a directory"):
            export_checkpoint(str(step), str(tmp_path / "m.safetensors"))
    monkeypatch.setattr("aiockpt.interchange.write_safetensors.MAX_HEADER_NBYTES", 3000)
    assert len(export_checkpoint(str(step), str(tmp_path / "set")).files) > 2


def refuse_header(*arguments: Any, **options: Any) -> NoReturn:
    raise ValueError("a header of 100003840 bytes is longer than readers take")
