"""The coordinator's thread: ways in, and no future that stays open when it ends."""

from __future__ import annotations

import threading

import anyio
import pytest

from aiockpt.coordinator.loop_thread import LoopThread
from aiockpt.errors import UsageError

pytestmark = pytest.mark.process


async def answer(value: int) -> int:
    await anyio.lowlevel.checkpoint()
    return value


async def fail() -> None:
    await anyio.lowlevel.checkpoint()
    raise KeyError("x")


def test_results_and_errors_arrive() -> None:
    """A task's outcome arrives in its future, and an error of one task ends nothing else."""
    loop = LoopThread("aiockpt-test")
    loop.start()
    assert loop.submit(answer, 7).result(10) == 7
    with pytest.raises(KeyError):
        loop.submit(fail).result(10)
    assert loop.submit(answer, 8).result(10) == 8
    loop.stop()
    loop.ended.result(10)


def test_what_runs_at_the_end_gets_an_error() -> None:
    """No future is left open: running tasks, and tasks submitted after the end."""
    loop = LoopThread("aiockpt-test")
    loop.start()
    running = loop.submit(anyio.sleep_forever)
    loop.submit(answer, 1).result(10)
    loop.stop()
    loop.ended.result(10)
    for future in (running, loop.submit(answer, 1)):
        with pytest.raises(UsageError):
            future.result(10)
    assert not loop.post(print)


def test_posting_from_many_threads() -> None:
    """Every call posted before the stop runs, each once."""
    loop = LoopThread("aiockpt-test")
    loop.start()
    seen: list[int] = []
    threads = [
        threading.Thread(target=lambda base=base: [loop.post(seen.append, base + i) for i in range(100)])
        for base in range(0, 400, 100)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loop.submit(answer, 0).result(10)
    assert sorted(seen) == list(range(400))
    loop.stop()
    loop.ended.result(10)
