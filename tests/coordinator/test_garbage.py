"""The collector stays out of ``save()``, and is as it was behind it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from aiockpt import blocking
from aiockpt.coordinator.garbage import collector_paused


class Witness:
    """Sees whether the collector may run while its state is read."""

    def __init__(self, error: Exception | None = None) -> None:
        self.seen: list[bool] = []
        self._error = error

    def state_dict(self) -> dict[str, Any]:
        self.seen.append(gc.isenabled())
        if self._error is not None:
            raise self._error
        return {"x": torch.ones(3)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.process
def test_a_save_is_not_collected_in(tmp_path: Path) -> None:
    """Nor does one that fails leave the collector off."""
    witness, failing = Witness(), Witness(ValueError("no"))
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.save(0, {"witness": witness})
        assert gc.isenabled()
        with pytest.raises(Exception, match="no"):
            ckpt.save(1, {"failing": failing})
        assert gc.isenabled()
    assert witness.seen == failing.seen == [False]


def test_a_program_without_collector_stays_so() -> None:
    """It was switched off by the program, and only that switches it on again."""
    gc.disable()
    try:
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
