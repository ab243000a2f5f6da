"""Checkpoints of several ranks as files for other programs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aiockpt.errors import CheckpointCorruptError
from aiockpt.interchange.exporting import export_checkpoint
from tests.restoring.ranked import by_dim, write_ranks


def written(run: Path, dim: int) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write a checkpoint of three ranks, each with something of its own."""
    tensors = {"w": torch.randn(7, 5), "odd": torch.randn(4).to(torch.bfloat16), "tiny": torch.ones(1, 9)}
    states = [{"model": tensors, "own": {"t": torch.full((3,), float(rank)), "n": rank}} for rank in range(3)]
    return write_ranks(run, states, by_dim(dim, 3), own=["own"]), tensors


@pytest.mark.parametrize("dim", [0, 1])
def test_cut_tensors_are_whole_outside(tmp_path: Path, dim: int) -> None:
    """In a directory, one file, and a file of torch; of what is each rank's own that of rank 0 goes out."""
    step, tensors = written(tmp_path / "run", dim)
    export_checkpoint(str(step), str(tmp_path / "set"), part="model")
    export_checkpoint(str(step), str(tmp_path / "all.safetensors"))
    export_checkpoint(str(step), str(tmp_path / "all.pt"))
    by_torch = torch.load(tmp_path / "all.pt", weights_only=True)
    by_name = load_file(tmp_path / "set" / "model.safetensors")
    everything = load_file(tmp_path / "all.safetensors")
    assert by_name.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(by_name[name], tensor)
        assert torch.equal(everything[f"model.{name}"], tensor)
        assert torch.equal(by_torch["model"][name], tensor)
    assert torch.equal(everything["own.t"], torch.zeros(3))
    assert by_torch["own"]["n"] == 0


def test_a_bad_part_is_not_exported(tmp_path: Path) -> None:
    """Its file is named, and nothing appears."""
    step, _ = written(tmp_path / "run", 0)
    path = step / "model" / "model-00003-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointCorruptError, match="model-00003-of-00003"):
        export_checkpoint(str(step), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
