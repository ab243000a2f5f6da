"""Training steps with saves in flight, counted and timed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from bench.entrant import Pending, Saver
from bench.gpu_role import DeviceTraining
from bench.state import BenchState, Training, make_state
from bench.stepping import Stepping


class Scripted(Saver):
    """A save lasts until as many steps asked it to be staged as it is told."""

    def __init__(self, state: BenchState, directory: Path, *, steps: int = 1, error: Exception | None = None) -> None:
        super().__init__(state, directory)
        self.steps, self.error = steps, error
        self.log: list[str] = []

    def begin(self, step: int) -> Pending:
        """Note the call."""
        self.log.append(f"begin {step}")
        return _Scripted(self, step)

    def discard(self, step: int) -> None:
        """Note the call."""
        self.log.append(f"discard {step}")


class _Scripted:
    def __init__(self, saver: Scripted, step: int) -> None:
        self._saver, self._step, self._left, self._over = saver, step, saver.steps, threading.Event()

    def wait_staged(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._over.set()

    def wait(self) -> None:
        self._over.wait(2)  # the last one may have fewer steps left than it wants, and ends by itself
        if self._saver.error is not None:
            raise self._saver.error


@pytest.fixture
def state() -> Training:
    state = make_state("gpt", 1 << 20)
    assert isinstance(state, Training)
    return state


def test_a_save_begins_where_none_is_in_flight(state: Training, tmp_path: Path) -> None:
    """Every step is one during which a save was under way; the last is waited for, and its checkpoint removed."""
    saver = Scripted(state, tmp_path, steps=2)
    block = Stepping(state, saver).saving(6)
    begun = [line for line in saver.log if line.startswith("begin")]
    assert 2 <= len(begun) <= 3
    assert saver.log == [f"{what} {n + 1}" for n in range(len(begun)) for what in ("begin", "discard")]
    assert (len(block.steps_s), len(block.waits_s), len(block.blocked_s)) == (6, 6, len(begun))
    assert len(begun) - 1 <= len(block.durable_s) <= len(begun)
    assert all(0 <= wait <= step for wait, step in zip(block.waits_s, block.steps_s, strict=True))


def test_the_failure_of_a_save_ends_the_measurement(state: Training, tmp_path: Path) -> None:
    """A row of figures without checkpoints would be worth nothing."""
    with pytest.raises(OSError, match="full"):
        Stepping(state, Scripted(state, tmp_path, error=OSError("full"))).saving(2)


def test_the_batch_grows_with_the_time_that_is_asked_for(state: Training, tmp_path: Path) -> None:
    """In whole sequences, from one on."""
    stepping = Stepping(state, Scripted(state, tmp_path))
    stepping.tokens = 24
    assert stepping.tokens == 24
    stepping.tokens = 300
    assert stepping.tokens == 256
    assert stepping.calibrate(0.0) <= 32  # the shortest batch that it tries, less what noise says
    assert stepping.calibrate(5.0) % 128 == 0


def test_saves_alone_and_beside_steps_are_of_one_run(state: Training, tmp_path: Path) -> None:
    """However many saves the steps had time for: no step of the run is saved twice."""
    savers: list[Scripted] = []

    class Kept(Scripted):
        def __init__(self, state: BenchState, directory: Path) -> None:
            super().__init__(state, directory)
            savers.append(self)

    role = DeviceTraining(Kept, state, tmp_path)
    for command in ("round", "discard", "saving 3", "round", "discard", "saving 2", "round"):
        role.obey(command.split()[0], command.split()[1:])
    begun = [line for line in savers[0].log if line.startswith("begin")]
    assert len(begun) >= 5
    assert begun == [f"begin {n + 1}" for n in range(len(begun))]
