"""No torn copy under the step that follows at once, whatever steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.gpu.scenes import DEVICE, Scene, busy, guarded, live
from tests.staging.rig import PATIENCE_SECONDS, Rig

pytestmark = pytest.mark.gpu


def saves_whole(rig: Rig, state: dict[str, Any], train: Callable[[], object], turns: int = 3) -> None:
    """Save while the device is busy, go on training at once, and compare with the state at the call."""
    for _ in range(turns):
        train()
        expected = live(state)
        busy()
        staging = rig.stage(state)
        assert staging.lazy_nbytes > 0
        train()
        train()
        assert staging.wait(PATIENCE_SECONDS), staging.error
        assert rig.staged(state) == expected
        assert live(state) != expected


@pytest.mark.parametrize(
    "options", [{"foreach": False}, {"foreach": True}, {"fused": True}, {"capturable": True}], ids=str
)
def test_plain_foreach_fused_and_capturable(rig: Rig, options: dict[str, Any]) -> None:
    """The step is enqueued at once, and runs behind the copies; no thread waits."""
    scene = Scene(**options)
    guarded(scene, rig)
    saves_whole(rig, scene.state, scene.train)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.Adafactor])
def test_other_optimizers(rig: Rig, kind: type[torch.optim.Optimizer]) -> None:
    """What each keeps on the device is guarded as well."""
    scene = Scene()
    scene.optimizer = kind(scene.model.parameters(), lr=1e-3)  # type: ignore[call-arg]
    scene.state["optimizer"] = scene.optimizer
    guarded(scene, rig)
    saves_whole(rig, scene.state, scene.train)


def test_an_optimizer_in_the_backward_pass(rig: Rig) -> None:
    """Each parameter's own optimizer steps in a thread of autograd's, as soon as its gradient is there."""
    scene = Scene()
    optimizers = {name: torch.optim.AdamW([p], lr=1e-2) for name, p in scene.model.named_parameters()}

    def step_of(name: str) -> Callable[[torch.Tensor], None]:
        def step(parameter: torch.Tensor) -> None:
            optimizers[name].step()
            optimizers[name].zero_grad()

        return step

    for name, parameter in scene.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(step_of(name))
    state = {"model": scene.model, "optimizers": optimizers}

    def train() -> None:
        scene.loss().backward()

    train()
    rig.save(state)
    saves_whole(rig, state, train)


def test_under_a_gradient_scaler(rig: Rig) -> None:
    """Scale and growth are on the device and written by ``update``: they are copied in order with the stream."""
    scene = Scene()
    scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0, growth_interval=1)
    scene.state["scaler"] = scaler

    def train() -> None:
        scene.optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.float16):
            loss = scene.loss()
        scaler.scale(loss).backward()
        scaler.step(scene.optimizer)
        scaler.update()

    train()
    rig.save(scene.state)
    saves_whole(rig, scene.state, train)


def test_bfloat16_with_an_optimizer_of_float32(rig: Rig) -> None:
    """Parameters and their state differ in dtype."""
    scene = Scene(fused=True)
    scene.model.to(torch.bfloat16)
    half = torch.ones(4, scene.width, device=DEVICE, dtype=torch.bfloat16)

    def train() -> None:
        scene.optimizer.zero_grad()
        scene.model(half).square().mean().backward()
        scene.optimizer.step()

    train()
    rig.save(scene.state)
    saves_whole(rig, scene.state, train)


def test_an_ema_that_waits(rig: Rig) -> None:
    """The documented swap: after ``wait`` any write is right, and nothing is torn."""
    scene = Scene()
    guarded(scene, rig)
    averages = [parameter.detach().clone() for parameter in scene.model.parameters()]
    expected = live(scene.state)
    busy()
    staging = rig.stage(scene.state)
    assert staging.wait(PATIENCE_SECONDS), staging.error
    with torch.no_grad():
        for parameter, average in zip(scene.model.parameters(), averages, strict=True):
            parameter.data.copy_(average * 2)
    assert rig.staged(scene.state) == expected


def test_a_module_that_is_compiled(rig: Rig) -> None:
    """The wrapper of ``torch.compile`` is no part of the names; its step is the optimizer's."""
    scene = Scene()
    scene.model = torch.compile(scene.model, backend="aot_eager")  # type: ignore[assignment]
    scene.state["model"] = scene.model
    guarded(scene, rig)
    saves_whole(rig, scene.state, scene.train)
    assert "model.0.weight" in rig.staged(scene.state)


class _Averaged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 256)
        self.norm = nn.BatchNorm1d(256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.layer(x))
        return result


def test_running_statistics(rig: Rig) -> None:
    """A forward pass writes them by kernels that count nothing: no optimizer owns them, so the stream waits."""
    model = _Averaged().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    state = {"model": model, "optimizer": optimizer}

    def train() -> None:
        optimizer.zero_grad()
        model(torch.randn(64, 256, device=DEVICE)).square().mean().backward()
        optimizer.step()

    train()
    rig.save(state)
    saves_whole(rig, state, train)
