"""transformers: a small Llama, saved as it is, compiled and wrapped; and what save_pretrained writes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import aiockpt.blocking
from aiockpt.interchange.exporting import export_checkpoint
from aiockpt.interchange.importing import import_checkpoint
from tests.interop.group import process_group
from tests.interop.states import assert_bit_equal
from tests.restoring.restoring import restore
from tests.restoring.writing import write_step

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def transformers() -> Any:
    """The library, imported when the first test needs it: it takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports; none of ours
        import transformers
        from transformers import LlamaForCausalLM  # noqa: F401  # lazily imported otherwise, inside a test
    transformers.utils.logging.disable_progress_bar()
    return transformers


def small_llama(transformers: Any, *, tied: bool = False, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def assert_same_model(found: nn.Module, expected: nn.Module) -> None:
    assert_bit_equal(found.state_dict(), expected.state_dict())
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        assert torch.equal(found.eval()(ids).logits, expected.eval()(ids).logits)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_from_pretrained_takes_a_step(tied: bool, transformers: Any, tmp_path: Path) -> None:
    """Straight from step-N/model: plain, compiled, under DDP, and both."""
    model = small_llama(transformers, tied=tied)
    with process_group(tmp_path), aiockpt.blocking.Checkpointer(tmp_path / "run") as checkpointer:
        compiled = torch.compile(model, backend="eager")
        ddp = nn.parallel.DistributedDataParallel(model)
        both = nn.parallel.DistributedDataParallel(compiled)
        for step, wrapped in enumerate((model, compiled, ddp, both)):
            checkpointer.save(step, {"model": wrapped}).result()
    for step in range(4):
        folder = tmp_path / "run" / f"step-{step}" / "model"
        assert {"config.json", "generation_config.json"} <= {path.name for path in folder.iterdir()}
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert_same_model(loaded, model)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("max_shard_nbytes", [1 << 30, 10_000])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_from_pretrained_takes_an_export(tied: bool, max_shard_nbytes: int, transformers: Any, tmp_path: Path) -> None:
    """One file, or shards; with the configurations."""
    model = small_llama(transformers, tied=tied).bfloat16()
    step = write_step(tmp_path / "run", 1, {"nets": {"x": 1}, "model": model})
    export_checkpoint(str(step), str(tmp_path / "set"), part="model", max_shard_nbytes=max_shard_nbytes)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "set", dtype="auto")
    assert_bit_equal(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("max_shard_size", ["1GB", "10KB"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_save_pretrained_wrote_restores(
    tied: bool, max_shard_size: str, transformers: Any, tmp_path: Path
) -> None:
    """Into a fresh model of the same configuration, and from_pretrained takes the imported step again."""
    model, fresh = small_llama(transformers, tied=tied), small_llama(transformers, tied=tied, seed=1)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    imported = import_checkpoint(str(tmp_path / "theirs"), str(tmp_path / "run"), step=0)
    restore(tmp_path / "run", {"model": nn.parallel.DataParallel(fresh)})
    assert_same_model(fresh, model)
    assert_same_model(transformers.AutoModelForCausalLM.from_pretrained(f"{imported.path}/model"), model)
