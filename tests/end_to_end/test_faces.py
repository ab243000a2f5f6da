"""Both faces: same names, any loop, any task, any thread."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

import aiockpt
from aiockpt import blocking
from tests.support import Training, assert_same, run_script, stopped

pytestmark = pytest.mark.process

BACKENDS: dict[str, dict[str, Any]] = {
    "asyncio": {"backend": "asyncio"},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}


@pytest.fixture(params=BACKENDS)
def run_async(request: pytest.FixtureRequest) -> Callable[[Callable[[], Coroutine[Any, Any, Any]]], Any]:
    """Run a coroutine function on each of the loops that anyio knows."""
    return lambda body: anyio.run(body, **BACKENDS[request.param])


def test_save_and_restore_on_every_loop(run_async: Any, tmp_path: Path) -> None:
    """``await save`` is durable; a fresh training restores it bit for bit and trains on alike."""

    async def body() -> None:
        training = Training()
        async with aiockpt.Checkpointer(tmp_path / "run") as ckpt:
            assert await ckpt.restore(training.state) is None
            training.step()
            saved = await ckpt.save(0, training.state, metadata={"why": "test"})
            expected = training.snapshot()
            assert saved.path == str(tmp_path / "run" / "step-0")
            assert saved.nbytes > 0
            assert await ckpt.steps() == [0]
            assert await ckpt.latest() == 0
            assert await ckpt.verify(0) > 0
            later = [training.step() for _ in range(3)]
            fresh = Training(seed=1)
            restored = await ckpt.restore(fresh.state)
            assert restored is not None
            assert (restored.step, restored.metadata) == (0, {"why": "test"})
            assert_same(expected, fresh.snapshot())
            assert [fresh.step() for _ in range(3)] == later

    run_async(body)


def test_the_blocking_face_in_a_classic_loop(tmp_path: Path) -> None:
    """The same without await; leaving the block makes the last save durable."""
    training = Training()
    with blocking.Checkpointer(tmp_path / "run") as ckpt:
        assert ckpt.restore(training.state) is None
        ckpt.prepare(training.state)
        training.step()
        save = ckpt.save(0, training.state)
        save.wait_staged()
        expected = training.snapshot()
        training.step()
        assert save.result(60).step == 0
        training.step()
        ckpt.save(2, training.state)
    assert blocking.steps(tmp_path / "run") == [0, 2]
    fresh = Training(seed=1)
    assert blocking.restore(tmp_path / "run", fresh.state, step=0) is not None
    assert_same(expected, fresh.snapshot())


def test_the_blocking_face_in_a_thread_and_under_a_running_loop(tmp_path: Path) -> None:
    """Neither a thread without a loop nor a thread with a running one is in its way."""

    def work(run: Path) -> None:
        with blocking.Checkpointer(run) as ckpt:
            ckpt.save(0, {"x": torch.arange(4)}).result(60)

    thread = threading.Thread(target=work, args=(tmp_path / "thread",))
    thread.start()
    thread.join(60)

    async def under_a_loop() -> None:
        work(tmp_path / "loop")

    anyio.run(under_a_loop)
    for run in ("thread", "loop"):
        assert torch.equal(blocking.load(tmp_path / run)["x"], torch.arange(4))


def test_reading_without_a_writer_beside_a_running_job(run_async: Any, tmp_path: Path) -> None:
    """``load``, ``restore`` and ``steps`` need neither worker nor lock."""

    async def body() -> None:
        async with aiockpt.Checkpointer(tmp_path) as ckpt:
            await ckpt.save(3, {"x": torch.arange(4), "n": 7})
            assert await aiockpt.steps(tmp_path) == [3]
            loaded = await aiockpt.load(tmp_path)
            assert torch.equal(loaded["x"], torch.arange(4))
            assert loaded["n"] == 7
            target = {"x": torch.zeros(4, dtype=torch.int64), "n": 0}
            restored = await aiockpt.restore(tmp_path / "step-3", target)
            assert restored is not None
            assert torch.equal(target["x"], torch.arange(4))
            assert target["n"] == 7

    run_async(body)


def test_open_and_close_in_different_tasks(run_async: Any, tmp_path: Path) -> None:
    """As in notebook cells and fixtures: no task group or cancel scope is held between calls."""

    async def body() -> None:
        ckpt = aiockpt.Checkpointer(tmp_path)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ckpt.open)
        save = ckpt.save(0, {"x": torch.arange(4)})
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(save.result)
            tasks.start_soon(save.result)
        assert (await save).step == 0
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ckpt.close)
        await ckpt.close()

    run_async(body)


def test_cancelling_or_timing_out_a_wait_leaves_the_save_alone(run_async: Any, tmp_path: Path) -> None:
    """Only ``cancel()`` and ``save(timeout=)`` end a save."""

    async def body() -> None:
        async with aiockpt.Checkpointer(tmp_path) as ckpt:
            await ckpt.prepare({"x": torch.arange(4)})
            pid = ckpt.statistics().worker_pid
            assert pid is not None
            with stopped(pid):
                save = ckpt.save(0, {"x": torch.arange(4)})
                with anyio.move_on_after(0.01) as scope:
                    await save
                assert scope.cancelled_caught
                with pytest.raises(TimeoutError):
                    await save.result(timeout=0.01)
                assert not save.done()
            assert (await save).step == 0
            assert save.phase == "committed"

    run_async(body)


def test_both_faces_have_the_same_names_and_signatures() -> None:
    """What differs is only ``await``."""

    def public(cls: type) -> dict[str, inspect.Signature]:
        return {
            name: inspect.signature(member)
            for name, member in inspect.getmembers(cls, callable)
            if not name.startswith("_")
        }

    for ours, theirs in ((aiockpt.Checkpointer, blocking.Checkpointer), (aiockpt.Save, blocking.Save)):
        left, right = public(ours), public(theirs)
        assert left.keys() == right.keys()
        for name, signature in left.items():
            assert signature.parameters == right[name].parameters, name
    for name in ("load", "restore", "steps"):
        left_signature = inspect.signature(getattr(aiockpt, name))
        assert left_signature.parameters == inspect.signature(getattr(blocking, name)).parameters


def test_with_on_the_async_class_says_what_to_use(tmp_path: Path) -> None:
    """A plain ``with`` names the blocking face instead of failing on a missing attribute."""
    with pytest.raises(TypeError, match=r"aiockpt\.blocking"), aiockpt.Checkpointer(tmp_path):
        pass


@pytest.mark.parametrize("act", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_checkpointer_is_not_copied(act: Callable[[Any], Any], tmp_path: Path) -> None:
    """Copy and pickle say what to do instead, for the object and for its saves."""
    with pytest.raises(TypeError, match="run's path"):
        act(aiockpt.Checkpointer(tmp_path))
    with blocking.Checkpointer(tmp_path) as ckpt:
        save = ckpt.save(0, {"x": 1})
        with pytest.raises(TypeError, match="belongs to its process"):
            act(save)


def test_importing_loads_no_torch() -> None:
    """The worker and the command line import the package and stay small."""
    result = run_script("import sys, aiockpt; print(sorted({'torch', 'anyio', 'numpy'} & sys.modules.keys()))")
    assert result.stdout == "[]\n", result.stderr


def test_every_public_name_is_there() -> None:
    """``__all__`` is exact: every name loads, and unknown ones are an AttributeError."""
    for name in aiockpt.__all__:
        assert getattr(aiockpt, name) is not None
    assert set(aiockpt.__all__) <= set(dir(aiockpt))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = aiockpt.no_such_name


def test_a_blocked_loop_delays_no_save(tmp_path: Path) -> None:
    """A training step that blocks the caller's loop leaves staging, writing and commit untouched."""

    async def body() -> None:
        training = Training()
        async with aiockpt.Checkpointer(tmp_path) as ckpt:
            await ckpt.prepare(training.state)
            save = ckpt.save(0, training.state)
            deadline = threading.Event()
            for _ in range(200):  # a training step: this thread, and so its loop, does nothing else
                if (tmp_path / "step-0").exists():
                    break
                deadline.wait(0.05)
            assert (tmp_path / "step-0" / "manifest.json").exists()
            await save

    anyio.run(body)
