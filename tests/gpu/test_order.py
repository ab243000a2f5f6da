"""Ordering against the caller's stream: the snapshot is the state at the call, and the call only enqueues."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from aiockpt.errors import TornSnapshotError
from aiockpt.staging.stager import Thresholds
from tests.gpu.scenes import DEVICE, MIB, Scene, busy, guarded, live
from tests.staging.rig import PATIENCE_SECONDS, SMALL, Rig

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("snapshot", ["guarded", "inline"])
def test_the_call_only_enqueues(make_rig: Callable[..., Rig], snapshot: str) -> None:
    """It returns while the stream is still busy, and the copies wait for the stream."""
    rig = make_rig(snapshot=snapshot)
    scene = Scene()
    for _ in range(3):
        scene.train()
        rig.save(scene.state)
    scene.train()
    expected = live(scene.state)
    spinning = busy(400)
    staging = rig.stage(scene.state)
    assert not spinning.query()
    assert not staging.done
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert spinning.query()
    assert rig.staged(scene.state) == expected


def test_what_the_stream_has_not_computed_yet_is_saved(rig: Rig) -> None:
    """A step that is enqueued but has not run is part of the snapshot."""
    scene = Scene()
    guarded(scene, rig)
    before = live(scene.state)
    busy()
    scene.train()
    staging = rig.stage(scene.state)
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert rig.staged(scene.state) == live(scene.state) != before


def test_what_is_not_guarded_is_ordered_by_the_stream(rig: Rig) -> None:
    """In the first save the caller's stream waits for the copy: any kernel behind it may write."""
    scene = Scene()
    scene.train()
    expected = live(scene.state)
    busy()
    staging = rig.stage(scene.state)
    assert staging.lazy_nbytes == 0
    with torch.no_grad():
        for parameter in scene.model.parameters():
            parameter.data.zero_()
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert rig.staged(scene.state) == expected


def test_a_write_behind_the_guard_is_found(rig: Rig) -> None:
    """The canaries find an EMA swap that ran before the copies; these tensors are inline from then on."""
    scene = Scene()
    guarded(scene, rig)
    torch.cuda.synchronize()
    (side,) = rig.stager._sides.values()
    with torch.cuda.stream(side.stream):  # the canaries are read on the caller's stream, the copies come behind this
        busy(300)
    staging = rig.stage(scene.state)
    scene.model[0].weight.data.zero_()
    assert not staging.wait(PATIENCE_SECONDS)
    assert isinstance(staging.error, TornSnapshotError)
    assert staging.error.keys == ("model.0.weight",)
    scene.train()
    assert rig.save(scene.state).lazy_nbytes > 0


def test_a_step_in_another_thread_and_stream(rig: Rig) -> None:
    """The stream that waits is the current one of the thread that steps."""
    scene = Scene()
    guarded(scene, rig)
    scene.backward()
    expected = live(scene.state)
    busy()
    staging = rig.stage(scene.state)

    def step() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            scene.optimizer.step()

    thread = threading.Thread(target=step)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert rig.staged(scene.state) == expected
    assert live(scene.state) != expected


def test_a_state_on_two_streams(rig: Rig) -> None:
    """Two models train on a stream each; the save is behind both, and each goes on at once."""
    scenes = [Scene(), Scene()]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    state = {"left": scenes[0].state, "right": scenes[1].state}
    here = torch.cuda.current_stream()

    def train_both() -> None:
        for scene, stream in zip(scenes, streams, strict=True):
            with torch.cuda.stream(stream):
                scene.train()

    for stream in streams:
        stream.wait_stream(here)
    for turn in range(5):
        train_both()
        expected = live(state)
        for stream in streams:
            with torch.cuda.stream(stream):
                busy(50)
            here.wait_stream(stream)
        staging = rig.stage(state)
        if turn < 2:  # nothing is guarded yet: the streams wait for the copies by the caller's
            for stream in streams:
                stream.wait_stream(here)
        else:
            assert staging.lazy_nbytes > 0
        train_both()
        assert staging.wait(PATIENCE_SECONDS), staging.error
        assert rig.staged(state) == expected


def test_a_stream_that_is_no_default(rig: Rig) -> None:
    """Training and saving on a stream of the user's own."""
    with torch.cuda.stream(torch.cuda.Stream()):
        scene = Scene()
        guarded(scene, rig)
        expected = live(scene.state)
        busy()
        staging = rig.stage(scene.state)
        scene.train()
        assert staging.wait(PATIENCE_SECONDS), staging.error
        assert rig.staged(scene.state) == expected


@pytest.mark.parametrize("thresholds", [SMALL, Thresholds()], ids=["small", "default"])
def test_every_dtype_stride_and_size(make_rig: Callable[..., Rig], thresholds: Thresholds) -> None:
    """Neighbours of every dtype, strides, empty tensors, large ones, and CPU tensors between them."""
    rig = make_rig(thresholds=thresholds)
    dtypes = [
        torch.float32,
        torch.bfloat16,
        torch.int64,
        torch.bool,
        torch.float8_e4m3fn,
        torch.uint16,
        torch.complex64,
    ]
    tensors: dict[str, torch.Tensor] = {}
    for i in range(300):
        numbers = torch.randint(0, 2, (i * 7 % 300,), device=DEVICE if i % 11 else "cpu")
        tensors[f"{i:03}"] = numbers.to(torch.float32).to(dtypes[i % len(dtypes)])
    tensors["scalar"] = torch.tensor(7.0, device=DEVICE)
    tensors["strided"] = torch.randn(600, 700, device=DEVICE).t()
    tensors["strided and large"] = torch.randn(3000, 4000, device=DEVICE).t()
    tensors["channels last"] = torch.randn(8, 16, 9, 9, device=DEVICE).to(memory_format=torch.channels_last)
    tensors["sliced"] = torch.randn(3 * MIB, device=DEVICE)[5:-7]
    tensors["large"] = torch.randn(40 * MIB, device=DEVICE)
    for i in range(40):
        tensors[f"joined {i:02}"] = torch.randn(MIB // 2, device=DEVICE)
    for _ in range(2):
        rig.save({"t": tensors})
        assert rig.staged({"t": tensors}) == live({"t": tensors})


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_state_on_two_devices(rig: Rig) -> None:
    """Each has a side stream of its own, and the hook makes each device's stream wait."""
    scene = Scene()
    there = [torch.randn(MIB, device="cuda:1") for _ in range(3)]
    parameters = [torch.nn.Parameter(tensor) for tensor in there]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    state: dict[str, Any] = {"here": scene.state, "there": {"p": dict(enumerate(parameters)), "optimizer": optimizer}}

    def train() -> None:
        scene.train()
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    for _ in range(4):
        train()
        torch.cuda.synchronize(1)
        expected = live(state)
        with torch.cuda.device(1):
            busy()
        staging = rig.stage(state)
        train()
        assert staging.wait(PATIENCE_SECONDS), staging.error
        assert rig.staged(state) == expected
