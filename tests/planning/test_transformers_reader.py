"""transformers reads a folder that data-parallel ranks wrote together, each its share of whole tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aiockpt.planning.local import Entry
from aiockpt.planning.placings import replicated
from tests.planning.job import Job, State, whole_array

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.parametrize("declared", [True, False], ids=["shares", "undeclared"])
def test_from_pretrained(tmp_path: Path, declared: bool) -> None:
    """All weights, bit by bit, from the files of three ranks or from the one that wrote what nobody declared."""
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in transformers.LlamaForCausalLM(config).state_dict().items()}
    placing = replicated(3) if declared else None
    entries = [Entry(("model", name), "F32", shape, "", placing) for name, shape in shapes.items()]
    plain = {"model/config.json": config.to_json_string().encode()}
    job = Job(3, lambda rank: State(entries, plain_files=plain))
    job.write(tmp_path)
    writers = {record.rank for record in job.records if record.data_start}
    assert writers == ({0, 1, 2} if declared else {0})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for entry in entries:
        found = loaded[entry.segments[1]].contiguous().view(torch.uint8).numpy().tobytes()
        assert found == whole_array(entry).tobytes(), entry.segments
