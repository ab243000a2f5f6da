"""Skips where there is no CUDA; ends a run that hangs, with the stacks of all threads."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.staging.rig import Rig

LIMIT_SECONDS = 240
"""For one test; a process of its own takes some 10 s to make a context."""
_stderr = os.dup(2)


def pytest_configure(config: pytest.Config) -> None:
    global _stderr
    os.close(_stderr)
    _stderr = os.dup(2)  # now it is the terminal's; while a test runs it is a file of pytest's


@pytest.fixture(autouse=True)
def _on_cuda_and_bounded() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip(f"needs CUDA: torch {torch.__version__} finds no device")
    faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True, file=_stderr)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    """Make Rigs that are closed at the end."""
    rigs: list[Rig] = []

    def make(**options: Any) -> Rig:
        rigs.append(Rig(**options))
        return rigs[-1]

    yield make
    torch.cuda.synchronize()
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    """A guarded Rig with small thresholds."""
    return make_rig()
