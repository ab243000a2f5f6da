"""Copying from a device, in every order that streams and events allow; ``tests/gpu`` does the same on a real one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from aiockpt.errors import SaveTimeoutError, TornSnapshotError, UsageError
from tests.staging.fake_cuda import Event, FakeCuda, Stream
from tests.staging.rig import PATIENCE_SECONDS, Rig, live

SEEDS = range(12)
LARGE, SMALL = 3000, 60
"""Elements of a tensor that is copied by itself, and of one that is joined with its neighbours."""


@pytest.fixture
def rig(cuda: FakeCuda) -> Iterator[Rig]:
    rig = Rig()
    yield rig
    cuda.run()
    rig.close()


class Scene:
    """Parameters on the device, an optimizer, and a tensor that no optimizer owns."""

    def __init__(self, cuda: FakeCuda, sizes: tuple[int, ...] = (LARGE, SMALL, 500, 500, LARGE, SMALL, SMALL)) -> None:
        self._cuda = cuda
        with cuda.passing():
            made = [cuda.put(torch.randn(size)) for size in sizes]
            self.parameters = [nn.Parameter(tensor) for tensor in made]
            for parameter in self.parameters:
                parameter.grad = cuda.put(torch.ones_like(parameter))
            self.free = cuda.put(torch.randn(700))
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.1, momentum=0.9, foreach=False)

    @property
    def state(self) -> dict[str, Any]:
        state = {str(i): parameter for i, parameter in enumerate(self.parameters)}
        return {"p": state, "free": self.free, "optimizer": self.optimizer}

    def train(self) -> None:
        """Enqueue a step, and a write to what no optimizer owns."""
        self.optimizer.step()
        with torch.no_grad():
            self.free.add_(1.0)

    def expect(self) -> dict[str, torch.Tensor]:
        """Enqueue a copy of everything, as it is at this place of the current stream."""
        copies = {f"p.{i}": parameter.detach().clone() for i, parameter in enumerate(self.parameters)}
        copies["free"] = self.free.clone()
        for i, parameter in enumerate(self.parameters):
            buffer = self.optimizer.state[parameter]["momentum_buffer"]
            copies[f"optimizer.state.p.{i}.momentum_buffer"] = buffer.clone()
        return copies

    def read(self, copies: dict[str, torch.Tensor]) -> dict[str, bytes]:
        with self._cuda.passing():
            return live(copies)


def warm_up(scene: Scene, rig: Rig, cuda: FakeCuda, seed: int) -> None:
    """Two saves, after which the guard has everything of the optimizer's."""
    for _ in range(2):
        scene.train()
        expected = scene.expect()
        staging = rig.stage(scene.state)
        scene.train()
        cuda.run(seed)
        assert staging.wait(PATIENCE_SECONDS), staging.error
        assert staged(rig, scene, cuda) == scene.read(expected)
    assert staging.lazy_nbytes > 4 * LARGE


def staged(rig: Rig, scene: Scene, cuda: FakeCuda) -> dict[str, bytes]:
    with cuda.passing():
        return rig.staged(scene.state)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_snapshot_is_the_state_at_the_call(cuda: FakeCuda, rig: Rig, seed: int) -> None:
    """What was enqueued before the call is in it, what comes behind it is not: first save, guarded saves."""
    scene = Scene(cuda)
    warm_up(scene, rig, cuda, seed)
    for turn in range(3):
        scene.train()
        expected = scene.expect()
        staging = rig.stage(scene.state)
        scene.train()
        scene.train()
        cuda.run(100 * turn + seed)
        assert staging.wait(PATIENCE_SECONDS), staging.error
        assert staged(rig, scene, cuda) == scene.read(expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_step_on_another_stream_and_thread(cuda: FakeCuda, rig: Rig, seed: int) -> None:
    """The stream that waits for the copies is the current one of the thread that steps."""
    scene = Scene(cuda, sizes=(LARGE, LARGE, 400))
    warm_up(scene, rig, cuda, seed)
    scene.train()
    expected = scene.expect()
    before = Event()
    before.record(cuda.current)
    staging = rig.stage(scene.state)
    other = Stream()
    other.wait_event(before)  # what it must see; the copies come behind it

    def step() -> None:
        with cuda, cuda.stream(other):
            scene.optimizer.step()

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    cuda.run(seed)
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert staged(rig, scene, cuda) == scene.read(expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_write_that_waits_for_nobody(cuda: FakeCuda, rig: Rig, seed: int) -> None:
    """An EMA swap on a stream of its own: the snapshot is right or fails, whichever came first on the device."""
    scene = Scene(cuda)
    warm_up(scene, rig, cuda, seed)
    scene.train()
    expected = scene.expect()
    before = Event()
    before.record(cuda.current)
    staging = rig.stage(scene.state)
    other = Stream()
    other.wait_event(before)
    with cuda.stream(other):
        scene.parameters[0].data.zero_()
    cuda.run(seed)
    if staging.wait(PATIENCE_SECONDS):
        assert staged(rig, scene, cuda) == scene.read(expected)
    else:
        assert isinstance(staging.error, TornSnapshotError)
        assert staging.error.keys == ("p.0",)


def test_nothing_of_the_device_is_kept(cuda: FakeCuda, rig: Rig) -> None:
    """A forked child that drops what is left of a save must not meet a CUDA event there."""
    scene = Scene(cuda)
    warm_up(scene, rig, cuda, 0)
    scene.train()
    staging = rig.stage(scene.state)
    scene.optimizer.step()
    owners = [*staging.pending._owners.values(), staging.pending._all]
    assert any(owner.events for owner in owners)
    cuda.run()
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert not any(owner.events for owner in owners)
    assert staging.devices == []


def test_a_device_that_is_late(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its save fails by ``stall_timeout``; the arena is not written into by another one until it has answered."""
    rig = Rig(stall_timeout=0.1)
    scene = Scene(cuda)
    scene.train()
    staging = rig.stage(scene.state)
    assert not staging.wait(PATIENCE_SECONDS)
    assert isinstance(staging.error, SaveTimeoutError)
    with pytest.raises(UsageError, match="still being copied"):
        rig.stage(scene.state)
    cuda.run()
    expected = scene.expect()
    staging = rig.stage(scene.state)
    cuda.run()
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert staged(rig, scene, cuda) == scene.read(expected)
    rig.close()


def test_a_device_without_memory_to_join_small_tensors(
    cuda: FakeCuda, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are copied one by one."""
    scene = Scene(cuda)
    scene.train()
    expected = scene.expect()

    def full(*args: object, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "cat", full)
        staging = rig.stage(scene.state)
    cuda.run()
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert staged(rig, scene, cuda) == scene.read(expected)
