"""A notebook: a real kernel runs cells that open, save and close, each in a task of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiockpt import blocking
from tests.support import ROOT

SETUP = "import sys; sys.path.insert(0, {root!r})\nimport torch, aiockpt"
CELLS = {
    "async": [
        SETUP,
        "ckpt = aiockpt.Checkpointer({run!r})",
        "await ckpt.open()",
        "save = ckpt.save(0, {{'x': torch.arange(4)}})",
        "await save",
        "await ckpt.close()",
    ],
    "blocking": [
        SETUP,
        "ckpt = aiockpt.blocking.Checkpointer({run!r})",
        "ckpt.open()",
        "ckpt.save(0, {{'x': torch.arange(4)}}).result(60)",
        "ckpt.close()",
    ],
}


@pytest.mark.parametrize("face", CELLS)
@pytest.mark.filterwarnings("ignore")  # the client library's own, about loops and paths
def test_cells(face: str, tmp_path: Path) -> None:
    """Both faces, cell by cell."""
    manager_module = pytest.importorskip("jupyter_client.manager", reason="jupyter_client is not installed")
    manager, client = manager_module.start_new_kernel(kernel_name="python3")
    try:
        for cell in CELLS[face]:
            reply = client.execute_interactive(
                cell.format(root=str(ROOT), run=str(tmp_path / "run")),
                timeout=60,
                output_hook=lambda message: None,
            )
            assert reply["content"]["status"] == "ok", (cell, reply["content"])
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
    assert blocking.steps(tmp_path / "run") == [0]
