"""torch's HuggingFaceStorageReader and HuggingFaceStorageWriter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import Shard, distribute_tensor

import aiockpt.blocking
from aiockpt.errors import ConfigError
from aiockpt.interchange.exporting import export_checkpoint
from aiockpt.interchange.importing import import_checkpoint
from tests.interop.group import process_group
from tests.interop.states import assert_bit_equal, every_dtype
from tests.restoring.writing import write_step


@pytest.fixture(autouse=True)
def _without_process_group() -> Iterator[None]:
    """torch warns that it assumes a single process, which is what these tests have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled, unavailable or uninitialized.*")
        warnings.filterwarnings("ignore", message=".*_get_pg_default_device.*")
        yield


def read(folder: Path, state: dict[str, Any], **options: Any) -> None:
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder), **options))


@pytest.mark.parametrize("threads", [1, 3])
def test_it_reads_a_folder_of_a_step(threads: int, tmp_path: Path) -> None:
    """Whole, every dtype, 0-d and empty tensors among them."""
    state = every_dtype()
    folder = write_step(tmp_path / "run", 1, {"model": state, "other": {"x": torch.ones(2)}}) / "model"
    fresh = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    read(folder, fresh, thread_count=threads)
    assert_bit_equal(fresh, state)


def test_it_reads_shards_of_an_export(tmp_path: Path) -> None:
    """By threads, and only what is asked for."""
    state = every_dtype()
    step = write_step(tmp_path / "run", 1, {"model": state})
    export_checkpoint(str(step), str(tmp_path / "set"), part="model", max_shard_nbytes=100)
    some = {name: torch.zeros_like(state[name]) for name in ("int32", "scalar", "empty", "complex64")}
    read(tmp_path / "set", some, thread_count=2)
    assert_bit_equal(some, {name: state[name] for name in some})


def test_it_reads_into_a_dtensor(tmp_path: Path) -> None:
    """Cut over a mesh, here of one rank."""
    whole = torch.randn(6, 4)
    folder = write_step(tmp_path / "run", 1, {"model": {"x": whole}}) / "model"
    with process_group(tmp_path):
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        state = {"x": distribute_tensor(torch.zeros(6, 4), mesh, [Shard(0)])}
        read(folder, state)
        assert torch.equal(state["x"].full_tensor(), whole)


@pytest.mark.process
def test_we_read_what_its_writer_wrote(tmp_path: Path) -> None:
    """Several files with an index."""
    state = {f"layer.{i}": torch.randn(4, 5) for i in range(5)} | {"half": torch.randn(3).bfloat16()}
    places = {name: 1 + index % 3 for index, name in enumerate(state)}
    writer = HuggingFaceStorageWriter(str(tmp_path / "theirs"), fqn_to_index_mapping=places)
    dcp.save(state, storage_writer=writer)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) == 3
    import_checkpoint(str(tmp_path / "theirs"), str(tmp_path / "run"), step=0)
    assert_bit_equal(aiockpt.blocking.load(tmp_path / "run")["model"], state)


@pytest.mark.process
def test_we_read_its_distributed_form_of_one_rank(tmp_path: Path) -> None:
    """Each file says where its tensors lie in whole ones; these are whole."""
    state = {"x": torch.randn(4), "scalar": torch.tensor(3)}
    writer = HuggingFaceStorageWriter(str(tmp_path / "theirs"), save_distributed=True)
    dcp.save(dict(state), storage_writer=writer)
    import_checkpoint(str(tmp_path / "theirs"), str(tmp_path / "run"), step=0)
    assert_bit_equal(aiockpt.blocking.load(tmp_path / "run")["model"], state)


def test_parts_of_tensors_are_refused(tmp_path: Path) -> None:
    """A file that has a second part, and one that may have the first."""
    metadata = {"DCP_SHARDING_INFO": '{"x": {"saved_offsets": [%d]}}'}
    for directory, offset in (("second", 4), ("first", 0)):
        (tmp_path / directory).mkdir()
        text = {key: value % offset for key, value in metadata.items()}
        safetensors.torch.save_file(
            {"x": torch.ones(4)}, tmp_path / directory / "shard-00001-model-00001-of-00002.safetensors", metadata=text
        )
    with pytest.raises(ConfigError, match="parts of larger ones"):
        import_checkpoint(str(tmp_path / "second"), str(tmp_path / "run"), step=0)
    (file,) = (tmp_path / "first").iterdir()
    with pytest.raises(ConfigError, match="may go on in other files"):
        import_checkpoint(str(file), str(tmp_path / "run"), step=0)
    assert not (tmp_path / "run").exists()
