"""Reading a state that is on the device."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from aiockpt.state.collect import collect
from aiockpt.state.objects import load_object
from aiockpt.state.rng import RNG
from tests.gpu.scenes import DEVICE
from tests.state.rebuild import rebuild, same

pytestmark = pytest.mark.gpu


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Make every wait for the device an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_collecting_never_waits_for_the_device(no_waiting: None) -> None:
    """Module, fused optimizer, scaler, conjugates and generators are read while kernels may still run."""
    model = nn.Linear(4, 4, device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler(DEVICE)
    scaler.scale(model(torch.ones(2, 4, device=DEVICE)).sum()).backward()
    optimizer.step()
    lazy = torch.ones(3, device=DEVICE, dtype=torch.complex64).conj()
    collected = collect({"m": model, "o": optimizer, "s": scaler, "z": lazy, "rng": RNG()})
    names = {entry.segments for entry in collected.entries}
    assert {("s", "scale"), ("s", "_growth_tracker"), ("o", "state", "m.weight", "step")} <= names


def test_cuda_generators_go_on_where_they_were() -> None:
    """Each device draws the same numbers again."""
    kept = random.getstate()
    torch.rand(1, device=DEVICE)
    saved = rebuild(collect({"rng": RNG()}))["rng"]
    expected = torch.rand(5, device=DEVICE)
    load_object(RNG(), saved)
    assert same(torch.rand(5, device=DEVICE).cpu(), expected.cpu())
    random.setstate(kept)


def test_a_scaler_loads_into_tensors_on_the_device() -> None:
    """The scale comes back into the live tensor, which a captured graph may read."""
    scaler, fresh = torch.amp.GradScaler(DEVICE, init_scale=4.0), torch.amp.GradScaler(DEVICE)
    scaler.scale(torch.ones(1, device=DEVICE))
    fresh.scale(torch.ones(1, device=DEVICE))
    held = fresh._scale
    load_object(fresh, rebuild(collect({"s": scaler}))["s"])
    assert fresh._scale is held
    assert fresh.get_scale() == 4.0
