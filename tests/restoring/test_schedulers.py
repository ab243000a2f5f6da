from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.restoring.restoring import restore
from tests.restoring.writing import write_step
from tests.state.test_schedulers import MAKERS, STEPS, go_on, make


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", MAKERS)
def test_every_scheduler_goes_on_where_it_was(name: str, tensor: bool, tmp_path: Path):
    """Optimizer and scheduler together, also with a learning rate that is a tensor."""

    def fresh() -> Any:
        return make(name, torch.tensor(0.5) if tensor else 0.5)

    model, optimizer, scheduler = fresh()
    go_on(optimizer, scheduler, STEPS)
    write_step(tmp_path, 1, {"m": model, "o": optimizer, "s": scheduler})
    expected = go_on(optimizer, scheduler, STEPS)
    other, resumed, resumed_scheduler = fresh()
    restore(tmp_path, {"m": other, "o": resumed, "s": resumed_scheduler})
    assert go_on(resumed, resumed_scheduler, STEPS) == expected
