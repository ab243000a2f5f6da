"""docs/files.md keeps its word: its blocks run, from the first to the last, in one folder."""

from __future__ import annotations

import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest

from aiockpt.cli.main import main
from tests.markdown import Block, blocks

PAGE = "docs/files.md"


def in_order() -> list[Block]:
    return sorted([*blocks(PAGE, "python"), *blocks(PAGE, "sh")], key=lambda block: block.line)


@pytest.mark.process
def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Code and commands."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what transformers imports; none of ours
        import transformers

        assert transformers.LlamaForCausalLM
    transformers.utils.logging.disable_progress_bar()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in in_order():
        if block.language == "python":
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*torch.distributed is disabled, unavailable.*")
                warnings.filterwarnings("ignore", message=".*_get_pg_default_device.*")
                names |= block.run(**names)
        else:
            for line in block.code.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "aiockpt"
                assert main(arguments) == 0, capsys.readouterr().err
    assert len(in_order()) == 11
    assert len(list((tmp_path / "llama-in-shards").glob("*.safetensors"))) > 1
