"""The cells of the recipe in a real kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiockpt import blocking
from tests.recipes.reader import RECIPES, Reader
from tests.support import PATIENCE_SECONDS


@pytest.mark.filterwarnings("ignore")  # the client library's own, about loops and paths
def test_cells_of_a_notebook(tmp_path: Path) -> None:
    """A real kernel runs the cells, one of them twice, and again after a restart without the last one."""
    manager_module = pytest.importorskip("jupyter_client.manager", reason="jupyter_client is not installed")
    reader = Reader(tmp_path / "reader")
    cells = {name: block.code for name, block in RECIPES.items() if name.startswith("cell ")}
    for order in (
        ("cell 1", "cell 2", "cell 3", "cell 2"),
        ("cell 1", "cell 2", "cell 3", "cell 4"),
    ):
        manager, client = manager_module.start_new_kernel(
            kernel_name="python3", cwd=str(reader.folder), env=reader.environment
        )
        try:
            for name in order:
                reply = client.execute_interactive(cells[name], timeout=PATIENCE_SECONDS, output_hook=lambda _: None)
                assert reply["content"]["status"] == "ok", (name, reply["content"])
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
            manager.cleanup_resources()
    steps = blocking.steps(reader.folder / "runs/notebook")
    assert steps[-1] in (19, 29)  # the last save of the first kernel was staged, or it was not
    assert steps[0] == 9
