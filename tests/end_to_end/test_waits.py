"""Waiting, on every loop: from another loop, more than once, given up, and asked for by a signal handler."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

import aiockpt
from aiockpt import blocking
from aiockpt.storage.faults import FaultPoint
from aiockpt.testing.faults import WORKER_ARGUMENT, FaultPlan, FaultRule
from tests.end_to_end.test_cancellation import sweep
from tests.end_to_end.test_faces import BACKENDS
from tests.support import Training, assert_same, attempts

pytestmark = pytest.mark.process

STATE: dict[str, Any] = {"x": torch.arange(100_000)}
SLOW = FaultPlan(rules=[FaultRule(point=FaultPoint.WORKER_FILE_SYNC, action="delay", seconds=0.5)]).to_json()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ready_is_before_idle_or_with_it(backend: str, tmp_path: Path) -> None:
    """A save would not wait; all is durable. ``skip`` and ``raise`` go by the slot, which is free for who awaited."""

    async def body() -> None:
        ckpt = aiockpt.Checkpointer(tmp_path)
        ckpt._coordinator.worker_faults = (WORKER_ARGUMENT, SLOW)
        async with ckpt:
            await ckpt.prepare(STATE)
            await ckpt.wait_ready()
            await ckpt.wait_idle()
            save = ckpt.save(0, STATE)
            await save.wait_staged()
            assert await ckpt.save(1, STATE, when_busy="skip") is None
            with pytest.raises(aiockpt.SaveBusyError):
                ckpt.save(1, STATE, when_busy="raise")
            assert not save.done()
            await ckpt.wait_idle()
            assert save.done()
            await ckpt.wait_ready()
            for step in range(1, 20):
                assert (await ckpt.save(step, STATE, when_busy="raise")).step == step
            assert await ckpt.steps() == list(range(20))

    anyio.run(body, **BACKENDS[backend])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_save_is_awaited_from_any_loop(backend: str, tmp_path: Path) -> None:
    """Opened on one loop, awaited on another and in other threads, more than once, closed on a third."""
    ckpt = aiockpt.Checkpointer(tmp_path)
    saves: list[Any] = []
    found: list[int] = []

    async def begin() -> None:
        await ckpt.open()
        saves.append(ckpt.save(0, STATE))

    async def wait() -> None:
        found.append((await saves[0]).step)
        found.append((await saves[0].result(timeout=60)).step)

    async def end() -> None:
        await ckpt.close()

    anyio.run(begin, **BACKENDS[backend])
    threads = [threading.Thread(target=anyio.run, args=(wait,), kwargs=options) for options in BACKENDS.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    anyio.run(end, **BACKENDS[backend])
    assert found == [0] * 2 * len(BACKENDS)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_reading_calls_that_are_cancelled(backend: str, tmp_path: Path) -> None:
    """Ever later: nothing is left behind, the next call does all of it, and the run is as it was."""
    training = Training()
    training.step()
    expected = training.snapshot()

    async def body() -> None:
        async with aiockpt.Checkpointer(tmp_path) as ckpt:
            await ckpt.save(0, training.state)
            fresh = Training(seed=1)
            calls: list[Callable[[], Awaitable[object]]] = [
                lambda: ckpt.restore(fresh.state),
                ckpt.load,
                lambda: ckpt.verify(0),
                ckpt.steps,
                lambda: ckpt.prepare(training.state),
            ]
            for call in calls:

                async def after(finished: bool) -> None:
                    assert await ckpt.latest() == 0

                await sweep(call, after)
            await ckpt.restore(fresh.state)
            assert_same(fresh.snapshot(), expected)
            await ckpt.save(1, fresh.state)

    anyio.run(body, backend=backend)
    assert blocking.steps(tmp_path) == [0, 1]
    assert attempts(tmp_path) == []


def test_preparing_that_is_cancelled(tmp_path: Path) -> None:
    """Ever later, each time for a state that is a little larger: the arena is made or not, and the next save works."""

    async def body() -> None:
        async with aiockpt.Checkpointer(tmp_path) as ckpt:
            size = 1 << 20
            step = -1

            async def operation() -> None:
                nonlocal size
                size += 4096
                await ckpt.prepare({"x": torch.zeros(size, dtype=torch.uint8)})

            async def after(finished: bool) -> None:
                nonlocal step
                step += 1
                await ckpt.save(step, {"x": torch.full((5,), float(step))})

            await sweep(operation, after)

    anyio.run(body)
    assert blocking.load(tmp_path)["x"].unique().item() == max(blocking.steps(tmp_path))


def test_a_request_of_a_signal_handler(tmp_path: Path) -> None:
    """Also where the signal comes while the thread is inside of a save."""
    with blocking.Checkpointer(tmp_path) as ckpt:

        class Signalled:
            def state_dict(self) -> dict[str, int]:
                os.kill(os.getpid(), signal.SIGUSR1)
                return {"n": 1}

            def load_state_dict(self, state: dict[str, int]) -> None: ...

        before = signal.signal(signal.SIGUSR1, lambda number, frame: ckpt.request_save("SIGUSR1"))
        try:
            assert ckpt.due(0) is None
            os.kill(os.getpid(), signal.SIGUSR1)
            assert ckpt.due(0) == "SIGUSR1"
            ckpt.save(0, STATE).result(60)
            assert ckpt.due(1) is None
            ckpt.save(1, {"object": Signalled()}).result(60)
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert ckpt.steps() == [0, 1]
