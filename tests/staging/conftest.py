"""Fixtures of the staging tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from aiockpt.staging import copy_cuda
from tests.staging.fake_cuda import FakeCuda
from tests.staging.rig import Rig


@pytest.fixture(scope="session", autouse=True)
def _an_optimizer_was_made() -> None:
    """The hook is registered by the first save that finds one made."""
    torch.optim.SGD([torch.zeros(1)], lr=0.1)


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    """Make Rigs that are closed at the end."""
    rigs: list[Rig] = []

    def make(**options: Any) -> Rig:
        rigs.append(Rig(**options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    """A guarded Rig with small thresholds."""
    return make_rig()


@pytest.fixture
def fresh_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard that may lose its sight: the process's own comes back afterwards."""
    from aiockpt.staging import guard

    monkeypatch.setattr(guard, "_guard", guard._Guard())


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """A device whose work is done when the test says so."""
    monkeypatch.setattr(copy_cuda, "JOINED_NBYTES", 8192)
    monkeypatch.setattr(copy_cuda, "RUN_NBYTES", 12_000)
    monkeypatch.setattr(copy_cuda, "CHUNK_NBYTES", 20_000)
    fake = FakeCuda()
    fake.patch(monkeypatch)
    with fake:
        yield fake
        fake.run()
