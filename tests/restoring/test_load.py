"""A checkpoint as a fresh nested dict."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

from aiockpt.errors import CheckpointCorruptError, ConfigError, StepNotFoundError
from aiockpt.restoring.load import load_checkpoint
from tests.restoring.writing import write_step
from tests.state.rebuild import same


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2, bias=False)
        self.b = nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight


def everything() -> dict[Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = optim.AdamW(model.parameters(), lr=torch.tensor(0.1))
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": optim.lr_scheduler.StepLR(optimizer, 3),
        "numbers": np.arange(5),
        "raw": bytes(9000),
        "stream": BytesIO(b"x" * 9000),
        "wide": torch.randn(3, dtype=torch.complex128),
        "half": torch.randn(3).to(torch.float8_e4m3fn),
        "odd": torch.ones(1, dtype=torch.float64),
        "empty": torch.zeros(0, 2),
        "list": [torch.ones(2), ("x", torch.zeros(1))],
        "order": OrderedDict(b=1, a={2: "two"}),
        5: None,
    }


@pytest.mark.parametrize("mmap", [False, True])
def test_everything_comes_back_by_type(mmap: bool, tmp_path: Path):
    """Modules as dicts, optimizers by parameter name, the rest as it was."""
    state = everything()
    write_step(tmp_path, 4, state)
    loaded = load_checkpoint(tmp_path, mmap=mmap)
    assert list(loaded) == list(state)
    plain = {key: value for key, value in state.items() if key not in ("model", "optimizer", "scheduler", "stream")}
    assert same({key: loaded[key] for key in plain}, plain)
    assert same(loaded["model"], dict(state["model"].state_dict()))
    assert loaded["stream"].getvalue() == b"x" * 9000
    assert loaded["scheduler"]["step_size"] == 3
    names = [f"model.{name}" for name, _ in state["model"].named_parameters()]
    assert list(loaded["optimizer"]["state"]) == names
    assert loaded["optimizer"]["param_groups"][0]["params"] == names
    assert torch.equal(loaded["optimizer"]["param_groups"][0]["lr"], torch.tensor(0.1))
    for name, param in state["model"].named_parameters():
        assert same(loaded["optimizer"]["state"][f"model.{name}"], dict(state["optimizer"].state[param]))


@pytest.mark.parametrize("mmap", [False, True])
def test_what_is_loaded_is_the_callers_own(mmap: bool, tmp_path: Path):
    """Writing changes neither the file nor what is loaded next; it outlives the checkpoint."""
    step = write_step(tmp_path, 1, {"m": {"x": torch.ones(3)}})
    first = load_checkpoint(tmp_path, mmap=mmap)
    first["m"]["x"].fill_(7)
    second = load_checkpoint(tmp_path, mmap=mmap)
    shutil.rmtree(step)
    assert second["m"]["x"].tolist() == [1, 1, 1]
    assert first["m"]["x"].tolist() == [7, 7, 7]


@pytest.mark.parametrize("mmap", [False, True])
def test_tied_tensors_share_memory(mmap: bool, tmp_path: Path):
    """As they did."""
    write_step(tmp_path, 1, {"model": Tied()})
    loaded = load_checkpoint(tmp_path, mmap=mmap)["model"]
    assert loaded["a.weight"].data_ptr() == loaded["b.weight"].data_ptr()
    loaded["a.weight"].fill_(3)
    assert loaded["b.weight"].eq(3).all()


def test_include_leaves_out_the_rest(tmp_path: Path):
    """Containers without anything go too; a list is taken as a whole."""
    write_step(tmp_path, 1, everything())
    assert list(load_checkpoint(tmp_path, include="model")) == ["model"]
    part = load_checkpoint(tmp_path, include=["*.exp_avg", "list.1", "order.b"])
    assert sorted(part) == ["list", "optimizer", "order"]
    assert [list(state) for state in part["optimizer"]["state"].values()] == [["exp_avg"]] * 4
    assert len(part["list"]) == 2
    assert part["order"] == OrderedDict(b=1)
    with pytest.raises(ConfigError, match="modle"):
        load_checkpoint(tmp_path, include=["model", "modle"])


def test_a_map_reads_no_data(tmp_path: Path):
    """Only headers are checked, so damage in the data goes unnoticed, and damage in the header does not."""
    step = write_step(tmp_path, 1, {"m": {"x": torch.ones(3)}})
    (file,) = step.rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert load_checkpoint(tmp_path, mmap=True)["m"]["x"][0] == 1
    with pytest.raises(CheckpointCorruptError):
        load_checkpoint(step)
    data[9] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointCorruptError):
        load_checkpoint(step, mmap=True)


def test_a_file_that_was_replaced_is_not_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By name it may be another checkpoint's by now."""
    from aiockpt.restoring import load as load_module

    step = write_step(tmp_path, 1, {"m": {"x": torch.ones(3)}})
    other = write_step(tmp_path / "other", 1, {"m": {"x": torch.zeros(3)}})
    selected = load_module.selected

    def replacing(view: Any, selection: Any) -> Any:
        shutil.rmtree(step)
        shutil.copytree(other, step)
        return selected(view, selection)

    monkeypatch.setattr(load_module, "selected", replacing)
    with pytest.raises(StepNotFoundError, match="replaced"):
        load_checkpoint(step, mmap=True)


def test_steps_and_fallback_are_those_of_restore(tmp_path: Path):
    """Newest good one, or the one that was asked for."""
    for step in (1, 2):
        write_step(tmp_path, step, {"x": step, "m": {"t": torch.ones(1)}})
    assert load_checkpoint(tmp_path)["x"] == 2
    assert load_checkpoint(tmp_path, step=1)["x"] == 1
    assert load_checkpoint(tmp_path / "step-1")["x"] == 1
    (file,) = (tmp_path / "step-2").rglob("*.safetensors")
    file.unlink()
    assert load_checkpoint(tmp_path)["x"] == 1
