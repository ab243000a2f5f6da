"""Cancellation at any moment: what was begun is either finished or undone, and nothing is left behind."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

import aiockpt
from aiockpt import blocking
from tests.conftest import open_descriptors
from tests.support import attempts

pytestmark = pytest.mark.process

STATE: dict[str, Any] = {"x": torch.arange(300_000)}


async def finishes_when_cancelled_after(seconds: float, operation: Callable[[], Awaitable[object]]) -> bool:
    """Run an operation and cancel it after a while; tell whether it was quicker."""
    with anyio.move_on_after(seconds) as scope:
        await operation()
    return not scope.cancelled_caught


async def sweep(operation: Callable[[], Awaitable[object]], after: Callable[[bool], Awaitable[object]]) -> None:
    """Cancel ever later until the operation finishes, looking each time at what is left."""
    seconds = 0.0
    while True:
        finished = await finishes_when_cancelled_after(seconds, operation)
        await after(finished)
        if finished:
            return
        seconds = seconds * 1.5 + 0.001


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_open(backend: str, tmp_path: Path) -> None:
    """A cancelled open leaves no process, thread, descriptor or lock: the next one gets the run."""

    async def body() -> None:
        ckpt = aiockpt.Checkpointer(tmp_path)

        async def operation() -> None:
            nonlocal ckpt
            ckpt = aiockpt.Checkpointer(tmp_path)
            await ckpt.open()

        async def after(finished: bool) -> None:
            if finished:
                await ckpt.save(0, STATE, overwrite=True)
                await ckpt.close()
            else:
                with pytest.raises(aiockpt.UsageError):
                    ckpt.save(0, STATE)

        await sweep(operation, after)

    anyio.run(body, backend=backend)
    assert blocking.steps(tmp_path) == [0]


def test_waiting_for_a_save(tmp_path: Path) -> None:
    """However early its wait is cancelled, the save goes on to its commit."""

    async def body() -> None:
        async with aiockpt.Checkpointer(tmp_path) as ckpt:
            await ckpt.prepare(STATE)
            step = 0
            save: Any = None

            async def operation() -> None:
                nonlocal step, save
                save = ckpt.save(step, STATE)
                step += 1
                await save

            async def after(finished: bool) -> None:
                assert (await save).step == step - 1

            await sweep(operation, after)
            assert await ckpt.steps() == list(range(step))

    anyio.run(body)


def test_close(tmp_path: Path) -> None:
    """A cancelled close has ended everything; what was staged is committed by the worker that was left."""
    runs: list[Path] = []

    async def body() -> None:
        ckpt: Any = None

        async def operation() -> None:
            nonlocal ckpt
            runs.append(tmp_path / f"run{len(runs)}")
            ckpt = aiockpt.Checkpointer(runs[-1])
            with anyio.CancelScope(shield=True):
                await ckpt.open()
                await ckpt.save(0, STATE).wait_staged()
            await ckpt.close()

        async def after(finished: bool) -> None:
            with contextlib.suppress(aiockpt.CommitUnknownError):  # left to the worker
                await ckpt.close()

        await sweep(operation, after)

    anyio.run(body)
    for run in runs:
        with blocking.Checkpointer(run) as ckpt:
            assert ckpt.steps() == [0]
        assert attempts(run) == []


def test_cancel_swept_over_a_save(tmp_path: Path) -> None:
    """``Save.cancel()`` at any moment: committed whole or not there, the slot is free, the next save works."""

    async def body() -> None:
        async with aiockpt.Checkpointer(tmp_path) as ckpt:
            await ckpt.prepare(STATE)
            for turn in range(30):
                save = ckpt.save(turn, STATE)
                await finishes_when_cancelled_after(turn * 0.0005, save.result)
                save.cancel()
                try:
                    await save
                except aiockpt.SaveCancelledError:
                    assert turn not in await ckpt.steps()
                else:
                    assert turn in await ckpt.steps()
            await ckpt.save(99, STATE)

    anyio.run(body)
    assert attempts(tmp_path) == []


def test_descriptors(tmp_path: Path) -> None:
    """At most 16 a trainer, whatever the number of tensors."""
    before = len(open_descriptors())
    with blocking.Checkpointer(tmp_path) as ckpt:
        state = {"small": {f"t{i}": torch.full((4,), float(i)) for i in range(10_000)}}
        ckpt.save(0, state).result(60)
        ckpt.restore(state)
        ckpt.save(1, state)
        assert len(open_descriptors()) - before <= 16
