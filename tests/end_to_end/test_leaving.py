"""Leaving: by an exception, by cancellation, without close, at the interpreter's exit."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
import torch
from torch import nn

import aiockpt
from aiockpt import blocking
from aiockpt.coordinator.save_record import SaveRecord
from aiockpt.protocol.lifecycle import SaveEvent
from tests.support import attempts, is_alive, run_script, start_script, stopped, wait_until

pytestmark = pytest.mark.process

STATE = {"x": torch.arange(100_000)}


class TrainingError(Exception):
    """What a training loop raises."""


def test_the_training_error_goes_on_as_itself(tmp_path: Path) -> None:
    """What is staged is drained; the error is the very same object, without notes where nothing failed."""
    error = TrainingError("nan")
    with pytest.raises(TrainingError) as caught, blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.save(0, STATE)
        raise error
    assert caught.value is error
    assert not getattr(error, "__notes__", [])
    assert blocking.steps(tmp_path) == [0]


def test_a_failed_save_is_noted_on_the_training_error(tmp_path: Path) -> None:
    """It never masks the training error."""
    with pytest.raises(TrainingError) as caught, blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.prepare(STATE)
        pid = ckpt.statistics().worker_pid
        assert pid is not None
        with stopped(pid):
            save = ckpt.save(0, STATE, timeout=0.05)
            wait_until(lambda: save._record.cancelling, "the time-out")
        raise TrainingError("nan")
    assert any("A save failed as well" in note for note in caught.value.__notes__)


def test_several_failures_are_one_group(tmp_path: Path) -> None:
    """Leaving without a training error raises all that nobody heard of."""
    ckpt = blocking.Checkpointer(tmp_path)
    ckpt.open()
    for step in range(2):
        _add_failure(ckpt, step)
    with pytest.raises(ExceptionGroup) as caught:
        ckpt.close()
    assert [error.step for error in caught.value.exceptions] == [0, 1]  # type: ignore[attr-defined]


def _add_failure(ckpt: blocking.Checkpointer, step: int) -> None:
    """Put a save that nobody awaited on the desk as failed: with one slot, two at once need a fake."""
    record = SaveRecord(step, timeout=None)
    ckpt._coordinator._desk.add(record)
    record.move(SaveEvent.FAIL)
    record.outcome.set_exception(aiockpt.SaveTimeoutError("late", step=step))
    ckpt._coordinator._desk.remove(record)


def test_close_timeout_bounds_the_drain(tmp_path: Path) -> None:
    """A worker that does not answer is killed at the deadline; what was abandoned is told, and nothing is left."""
    ckpt = blocking.Checkpointer(tmp_path, close_timeout=1)
    ckpt.open()
    ckpt.prepare(STATE)
    pid = ckpt.statistics().worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    ckpt.save(0, STATE)
    began = time.monotonic()
    with pytest.raises(aiockpt.SaveCancelledError, match="abandoned") as caught:
        ckpt.close()
    assert time.monotonic() - began < 30
    assert "close_timeout" in str(caught.value)
    assert not is_alive(pid)
    assert blocking.steps(tmp_path) == []


def test_close_without_drain(tmp_path: Path) -> None:
    """``close(drain=False)`` cancels what is not committed, and says so."""
    ckpt = blocking.Checkpointer(tmp_path)
    ckpt.open()
    ckpt.save(0, STATE).result(60)
    pid = ckpt.statistics().worker_pid
    assert pid is not None
    with stopped(pid):
        save = ckpt.save(1, STATE)
        closing = threading.Thread(target=lambda: outcome.append(_raised(lambda: ckpt.close(drain=False))))
        outcome: list[BaseException | None] = []
        closing.start()
        wait_until(lambda: save._record.cancelling, "the cancellation")
    closing.join(60)
    assert isinstance(outcome[0], aiockpt.SaveCancelledError)
    assert blocking.steps(tmp_path) == [0]
    assert attempts(tmp_path) == []


def _raised(call: Callable[[], object]) -> BaseException | None:
    try:
        call()
    except aiockpt.CheckpointError as exc:
        return exc
    return None


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_cancellation_passes_through(backend: str, tmp_path: Path) -> None:
    """A cancelled training leaves its block with its cancellation, and what was staged is durable."""

    async def body() -> None:
        with anyio.move_on_after(60) as scope:
            async with aiockpt.Checkpointer(tmp_path) as ckpt:
                ckpt.save(0, STATE)
                scope.cancel()
                await anyio.sleep_forever()
        assert scope.cancelled_caught

    anyio.run(body, backend=backend)
    assert blocking.steps(tmp_path) == [0]


def test_collected_without_close(tmp_path: Path) -> None:
    """A ResourceWarning; what is staged is still written, and everything ends."""
    ckpt = blocking.Checkpointer(tmp_path)
    ckpt.open()
    pid = ckpt.statistics().worker_pid
    assert pid is not None
    ckpt.save(0, STATE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del ckpt
        gc.collect()
    assert any(warning.category is ResourceWarning for warning in caught)
    wait_until(lambda: not is_alive(pid), "the worker's end")
    assert blocking.steps(tmp_path) == [0]


UNCLOSED = """
    import sys, torch, aiockpt
    ckpt = aiockpt.blocking.Checkpointer(sys.argv[1])
    ckpt.open()
    ckpt.prepare({"x": torch.arange(100_000)})
    print(ckpt.statistics().worker_pid, flush=True)
    save = ckpt.save(0, {"x": torch.arange(100_000)})
"""


def test_exit_without_close(tmp_path: Path) -> None:
    """The exit does not hang, and the worker finishes what was staged."""
    result = run_script(UNCLOSED, tmp_path)
    assert result.returncode == 0, result.stderr
    worker = int(result.stdout)
    wait_until(lambda: not is_alive(worker), "the worker's end")
    assert blocking.steps(tmp_path) == [0]
    assert attempts(tmp_path) == []


def test_exit_without_close_while_a_thread_waits(tmp_path: Path) -> None:
    """A thread of the program that waits for the save is no deadlock: threads are joined after the drain."""
    code = UNCLOSED + "    import threading; threading.Thread(target=save.result).start()\n"
    result = run_script(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert blocking.steps(tmp_path) == [0]


def test_exit_without_close_while_the_worker_beats(tmp_path: Path) -> None:
    """No event reaches the loop's thread when the interpreter is gone: that ended in a segmentation fault."""
    code = """
        import atexit, ctypes, sys, threading, traceback, torch, aiockpt

        def where() -> None:
            frame = sys._current_frames()[ckpt._coordinator._loop._thread.ident]
            print([entry.name for entry in traceback.extract_stack(frame)].count("hold"), flush=True)

        ckpt = aiockpt.blocking.Checkpointer(sys.argv[1])
        atexit.register(ckpt.close)  # runs last, and has nothing to wait for
        atexit.register(where)
        ckpt.open()
        libc = ctypes.CDLL(None)
        libc.on_exit(libc.sleep, None)  # called with the exit status, when the interpreter is gone; the worker beats on
        sys.exit(2)
    """
    result = run_script(code, tmp_path)
    assert (result.returncode, result.stdout) == (2, "1\n"), result.stderr


def test_a_second_ctrl_c_ends_the_wait(tmp_path: Path) -> None:
    """The first one unwinds and drains; the second ends the drain, the worker keeps what is staged."""
    trainer = start_script(
        """
        import os, signal, sys, torch, aiockpt
        state = {"x": torch.arange(100_000)}
        with aiockpt.blocking.Checkpointer(sys.argv[1]) as ckpt:
            ckpt.prepare(state)
            worker = ckpt.statistics().worker_pid
            os.kill(worker, signal.SIGSTOP)
            save = ckpt.save(0, state)
            save.wait_staged()
            save._record.wait_handed_over(60)
            print(worker, flush=True)
            sys.stdin.read()
        """,
        tmp_path,
        stdin=-1,
    )
    assert trainer.stdout is not None
    worker = int(trainer.stdout.readline())
    trainer.send_signal(signal.SIGINT)
    assert trainer.poll() is None
    wait_until(lambda: trainer.send_signal(signal.SIGINT) or trainer.poll() is not None, "the trainer's end")
    _, err = trainer.communicate()
    assert "KeyboardInterrupt" in err
    os.kill(worker, signal.SIGCONT)
    wait_until(lambda: not is_alive(worker), "the worker's end")
    assert blocking.steps(tmp_path) == [0]


def test_an_arena_that_is_refused_lets_go_of_the_state(tmp_path: Path) -> None:
    """The error is the caller's alone: held by us, its traceback would hold the model for ever."""

    def fails() -> weakref.ref[nn.Module]:
        model = nn.Linear(100, 100)
        with (
            pytest.raises(aiockpt.StorageError),
            blocking.Checkpointer(tmp_path / "run", capacity=4096) as checkpointer,
        ):
            checkpointer.prepare({"model": model})
        return weakref.ref(model)

    model = fails()
    gc.collect()
    assert model() is None
