"""CUDA graphs: no hook runs at a replay, and nothing of ours may come into a capture."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

import aiockpt
from aiockpt import blocking
from aiockpt.errors import ConfigError
from tests.gpu.scenes import Scene, busy, guarded, live
from tests.staging.rig import PATIENCE_SECONDS, Rig

pytestmark = pytest.mark.gpu


def warmed_up() -> Scene:
    """Train some steps on a side stream, as torch asks for before a capture."""
    scene = Scene(capturable=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            scene.train()
    torch.cuda.current_stream().wait_stream(side)
    return scene


def captured(scene: Scene) -> torch.cuda.CUDAGraph:
    """Capture a whole step."""
    scene.optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scene.loss().backward()
        scene.optimizer.step()
    return graph


def test_a_step_that_is_replayed_at_once(rig: Rig) -> None:
    """An optimizer that a graph holds is copied in order with the stream, though it was guarded before."""
    scene = warmed_up()
    guarded(scene, rig)
    graph = captured(scene)
    for _ in range(3):
        graph.replay()
        expected = live(scene.state)
        busy()
        staging = rig.stage(scene.state)
        assert staging.lazy_nbytes == 0
        graph.replay()
        graph.replay()
        assert staging.wait(PATIENCE_SECONDS), staging.error
        assert rig.staged(scene.state) == expected
        assert live(scene.state) != expected


def test_eager_steps_between_replays(rig: Rig) -> None:
    """Once captured, an optimizer is never guarded again, whatever it does beside."""
    scene = warmed_up()
    guarded(scene, rig)
    graph = captured(scene)
    for _ in range(3):
        scene.train()
        graph.replay()
        expected = live(scene.state)
        busy()
        staging = rig.stage(scene.state)
        assert staging.lazy_nbytes == 0
        graph.replay()
        assert staging.wait(PATIENCE_SECONDS), staging.error
        assert rig.staged(scene.state) == expected


def test_a_graph_of_forward_and_backward_alone(rig: Rig) -> None:
    """The optimizer steps eagerly, so it is guarded; the replay writes nothing of the state."""
    scene = warmed_up()
    guarded(scene, rig)
    scene.optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scene.loss().backward()

    def train() -> None:
        graph.replay()
        scene.optimizer.step()

    for _ in range(3):
        train()
        expected = live(scene.state)
        busy()
        staging = rig.stage(scene.state)
        assert staging.lazy_nbytes > 0
        train()
        assert staging.wait(PATIENCE_SECONDS), staging.error
        assert rig.staged(scene.state) == expected


def test_a_capture_while_copies_are_pending(rig: Rig) -> None:
    """The copy thread makes no CUDA call that would break it; the step that is captured waits for the copies."""
    scene = warmed_up()
    guarded(scene, rig)
    scene.backward()
    torch.cuda.synchronize()
    gc.collect()
    expected = live(scene.state)
    spinning = busy(200)
    staging = rig.stage(scene.state)
    assert staging.lazy_nbytes > 0
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    # Without torch.cuda.graph, which waits for the device first: here copies are pending when the capture begins.
    assert not spinning.query()
    with torch.cuda.stream(side):
        graph.capture_begin()
        scene.optimizer.step()
        graph.capture_end()
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert rig.staged(scene.state) == expected
    torch.cuda.current_stream().wait_stream(side)
    graph.replay()
    assert live(scene.state) != expected


def test_no_save_in_a_capture(tmp_path: Path) -> None:
    """``save`` and ``prepare`` are refused, the capture goes on, and the next save is taken."""
    scene = warmed_up()
    state = {**scene.state, "rng": aiockpt.RNG()}
    with blocking.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.prepare(state)
        scene.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            scene.loss().backward()
            for call in (lambda: checkpointer.save(0, state), lambda: checkpointer.prepare(state)):
                with pytest.raises(ConfigError, match="captured"):
                    call()
            scene.optimizer.step()
        graph.replay()
        expected = live(scene.state)
        save = checkpointer.save(1, state)
        graph.replay()
        save.result()
        restored = checkpointer.restore(state)
        assert restored is not None
        assert restored.step == 1
    assert live(scene.state) == expected
