"""safetensors' own library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import aiockpt.blocking
from aiockpt.interchange.exporting import export_checkpoint
from aiockpt.interchange.importing import import_checkpoint
from tests.interop.states import assert_bit_equal, every_dtype
from tests.restoring.restoring import restore
from tests.restoring.writing import write_step


def test_it_reads_what_a_save_wrote_file_by_file(tmp_path: Path) -> None:
    """Every dtype, by safe_open and by load_file."""
    state = every_dtype()
    step = write_step(tmp_path / "run", 1, {"model": state, "other": {"x": torch.arange(3)}})
    file = step / "model" / "model-00001-of-00001.safetensors"
    assert_bit_equal(safetensors.torch.load_file(file), state)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["format"] == "pt"
        assert_bit_equal({name: opened.get_tensor(name) for name in opened.keys()}, state)  # noqa: SIM118
        assert torch.equal(opened.get_slice("int32")[1:, :2], state["int32"][1:, :2])


def test_it_reads_what_a_save_wrote_by_the_index(tmp_path: Path) -> None:
    """The index beside the files names each tensor's."""
    state = every_dtype()
    folder = write_step(tmp_path / "run", 1, {"model": state}) / "model"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, framework="pt") as opened:
            found[name] = opened.get_tensor(name)
    assert_bit_equal(found, state)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())


@pytest.mark.parametrize("target", ["set", "one.safetensors"])
def test_it_reads_an_exported_part(target: str, tmp_path: Path) -> None:
    """Under the names that the module has, and nothing of ours beside them."""
    state = every_dtype()
    step = write_step(tmp_path / "run", 1, {"model": state, "other": {"x": torch.arange(3)}, "epoch": 3})
    exported = export_checkpoint(str(step), str(tmp_path / target), part="model")
    file = tmp_path / target / "model.safetensors" if target == "set" else tmp_path / target
    assert_bit_equal(safetensors.torch.load_file(file), state)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert (exported.tensors, exported.values_left_out) == (len(state), 0)
    assert exported.nbytes == sum(tensor.nbytes for tensor in state.values())


def test_it_reads_a_whole_state(tmp_path: Path) -> None:
    """Under full names; numpy arrays and long bytes are tensors, values stay behind."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    step = write_step(tmp_path / "run", 1, {"model": module, "optimizer": optimizer, "blob": b"x" * 5000, "epoch": 3})
    exported = export_checkpoint(str(step), str(tmp_path / "set"))
    found = safetensors.torch.load_file(tmp_path / "set" / "model.safetensors")
    assert {name for name in found if name.startswith("model.")} == {f"model.{name}" for name in module.state_dict()}
    first = next(iter(optimizer.state.values()))
    assert torch.equal(found["optimizer.state.model.0.weight.exp_avg"], first["exp_avg"])
    assert found["blob"].tolist() == [120] * 5000
    assert exported.files == ["model.safetensors"]
    assert exported.values_left_out == 2  # epoch, the parameter groups


def test_shards_and_their_index(tmp_path: Path) -> None:
    """No tensor is cut, the index names each one's file, and a tensor that is too large has a file of its own."""
    state = {f"layer.{i}": torch.full((100,), float(i)) for i in range(7)} | {"large": torch.ones(1000)}
    step = write_step(tmp_path / "run", 1, {"model": state})
    exported = export_checkpoint(str(step), str(tmp_path / "set"), part="model", max_shard_nbytes=1000)
    index = json.loads((tmp_path / "set" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert exported.files == [*files, "model.safetensors.index.json"]
    assert files == [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    found = {}
    for file in files:
        tensors = safetensors.torch.load_file(tmp_path / "set" / file)
        assert {name for name, home in index["weight_map"].items() if home == file} == tensors.keys()
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 1000 or list(tensors) == ["large"]
        found |= tensors
    assert_bit_equal(found, state)


def test_complex128_goes_out_as_pairs(tmp_path: Path) -> None:
    """safetensors has no such dtype; the export says what became of it."""
    state = {"z": torch.randn(3, dtype=torch.complex128)}
    step = write_step(tmp_path / "run", 1, {"model": state})
    exported = export_checkpoint(str(step), str(tmp_path / "z.safetensors"), part="model")
    found = safetensors.torch.load_file(tmp_path / "z.safetensors")
    assert torch.equal(torch.view_as_complex(found["z"]), state["z"])
    assert list(exported.converted) == ["z"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight


def test_load_model_takes_an_export_with_tied_weights(tmp_path: Path) -> None:
    """Stored once; the header has the other name as save_model notes it."""
    saved, fresh = Tied(), Tied()
    step = write_step(tmp_path / "run", 1, {"model": saved})
    exported = export_checkpoint(str(step), str(tmp_path / "tied.safetensors"), part="model")
    missing, unexpected = safetensors.torch.load_model(fresh, tmp_path / "tied.safetensors")
    assert (list(missing), list(unexpected)) == ([], [])
    assert_bit_equal(fresh.state_dict(), saved.state_dict())
    assert exported.tied == {"head.weight": "embedding.weight"}


@pytest.mark.process
@pytest.mark.parametrize("how", ["save_model", "save_file"])
def test_tied_weights_of_others_restore(how: str, tmp_path: Path) -> None:
    """Whether the file says which names are tied, or has left one of them out without a word."""
    saved, fresh = Tied(), Tied()
    if how == "save_model":
        safetensors.torch.save_model(saved, str(tmp_path / "m.safetensors"))
    else:
        kept = {name: tensor for name, tensor in saved.state_dict().items() if name != "head.weight"}
        safetensors.torch.save_file(kept, tmp_path / "m.safetensors")
    import_checkpoint(str(tmp_path / "m.safetensors"), str(tmp_path / "run"), step=0)
    restore(tmp_path / "run", {"model": fresh})
    assert_bit_equal(fresh.state_dict(), saved.state_dict())
    assert fresh.head.weight is fresh.embedding.weight


@pytest.mark.process
def test_we_read_what_it_wrote(tmp_path: Path) -> None:
    """Every dtype; the metadata say where it came from."""
    state = {name: tensor.contiguous() for name, tensor in every_dtype().items()}
    safetensors.torch.save_file(state, tmp_path / "m.safetensors", metadata={"author": "x"})
    imported = import_checkpoint(str(tmp_path / "m.safetensors"), str(tmp_path / "run"), step=7)
    assert imported.path == str(tmp_path / "run" / "step-7")
    assert_bit_equal(aiockpt.blocking.load(tmp_path / "run")["model"], state)
    fresh = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    restored = aiockpt.blocking.restore(tmp_path / "run", {"model": fresh})
    assert restored is not None
    assert restored.metadata["imported"]["from"] == str(tmp_path / "m.safetensors")
    assert restored.metadata["imported"]["kind"] == "safetensors"
    assert_bit_equal(fresh, state)


@pytest.mark.process
def test_a_step_goes_out_and_comes_back(tmp_path: Path) -> None:
    """Bit by bit, with float4 and E8M0, which safetensors' torch module reads and writes one way only."""
    state = every_dtype() | {
        "f4": torch.randint(0, 256, (3, 4), dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "e8m0": torch.randint(0, 255, (5,), dtype=torch.uint8).view(torch.float8_e8m0fnu),
    }
    step = write_step(tmp_path / "run", 1, {"model": state})
    export_checkpoint(str(step), str(tmp_path / "set"), part="model", max_shard_nbytes=64)
    import_checkpoint(str(tmp_path / "set"), str(tmp_path / "other"), step=2)
    assert_bit_equal(aiockpt.blocking.load(tmp_path / "other")["model"], state)
    import_checkpoint(str(step / "model"), str(tmp_path / "other"), step=3, part="again")
    assert_bit_equal(aiockpt.blocking.load(tmp_path / "other")["again"], state)
