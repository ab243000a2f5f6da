"""A worker's eye on its trainer: what counts as silence, and what does not."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest

from aiockpt.protocol.messages import TrainerBeat
from aiockpt.worker.trainer_watch import TrainerWatch
from tests.worker.driver import Save, check_checkpoint, snapshot, worker

LIMIT = 0.12


@dataclass
class Told:
    """Who is told."""

    silences: list[float] = field(default_factory=list)
    is_silent: anyio.Event = field(default_factory=anyio.Event)
    is_heard: anyio.Event = field(default_factory=anyio.Event)

    def trainer_is_silent(self, seconds: float) -> None:
        self.silences.append(seconds)
        self.is_silent.set()

    def trainer_is_heard(self) -> None:
        self.is_heard.set()


def run(
    body: Callable[[TrainerWatch, Told], Awaitable[None]],
    *,
    limit: float | None = LIMIT,
    has_unread: Callable[[], bool] = lambda: False,
) -> None:
    async def main() -> None:
        told = Told()
        watch = TrainerWatch(limit, told, has_unread)
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch.run)
                await body(watch, told)
                watch.end()

    anyio.run(main, backend="asyncio", backend_options={"use_uvloop": True})


def test_silence_is_told_once_and_so_is_its_end() -> None:
    """Each time that it comes."""

    async def body(watch: TrainerWatch, told: Told) -> None:
        watch.heard()
        assert not told.is_heard.is_set()
        for _ in range(2):
            told.is_silent, told.is_heard = anyio.Event(), anyio.Event()
            await told.is_silent.wait()
            watch.heard()
            assert told.is_heard.is_set()
        assert told.silences == [LIMIT] * 2

    run(body)


def test_each_word_counts_from_the_beginning() -> None:
    """Words in a fifth of the limit each, for five times the limit."""

    async def body(watch: TrainerWatch, told: Told) -> None:
        for _ in range(25):
            await anyio.sleep(LIMIT / 5)  # this is what is tested
            watch.heard()
        assert not told.silences

    run(body, limit=5 * LIMIT)


def test_what_waits_in_the_socket_is_a_word() -> None:
    """It was said, and nobody had a turn to read it yet."""
    looks = iter([True, True, True, False])

    async def body(watch: TrainerWatch, told: Told) -> None:
        await told.is_silent.wait()
        assert next(looks, None) is None

    run(body, has_unread=lambda: next(looks))


def test_who_was_stopped_itself_accuses_nobody() -> None:
    """A turn of its loop that took long counts for a short one, and the trainer's words are read behind it."""

    async def body(watch: TrainerWatch, told: Told) -> None:
        await anyio.lowlevel.checkpoint()
        threading.Event().wait(10 * LIMIT)  # the whole loop stands
        await anyio.sleep(LIMIT)  # one tick or two, of the six that make the limit
        assert not told.silences

    run(body, limit=5 * LIMIT)


def test_no_limit_and_the_end() -> None:
    """Then nothing is expected."""

    async def nothing(watch: TrainerWatch, told: Told) -> None:
        await anyio.lowlevel.checkpoint()

    async def ended(watch: TrainerWatch, told: Told) -> None:
        watch.end()
        await anyio.sleep(2 * LIMIT)  # in which it would tell
        assert not told.silences

    run(nothing, limit=None)
    run(ended)


@pytest.mark.process
def test_a_worker_alone_takes_beats_and_needs_none(tmp_path: Path) -> None:
    """With one rank nobody waits for its trainer but itself."""
    save = Save(snapshot(), step=1)
    with worker(tmp_path / "run") as child:
        child.send(TrainerBeat())
        child.begin(save)
        child.send(TrainerBeat())
        child.stage(save)
        child.end(save)
        child.outcome(save)
    check_checkpoint(tmp_path / "run/step-1", save)
