"""What ``save()`` does and refuses, through the real worker."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

import aiockpt
from aiockpt import blocking
from aiockpt.storage.faults import FaultPoint
from aiockpt.testing.faults import WORKER_ARGUMENT, FaultPlan, FaultRule
from tests.support import Training, is_alive, start_script, stopped, wait_until

pytestmark = pytest.mark.process


def hold(ckpt: blocking.Checkpointer) -> Any:
    """Keep the worker from doing anything."""
    pid = ckpt.statistics().worker_pid
    assert pid is not None
    return stopped(pid)


STATE: dict[str, Any] = {"x": torch.arange(1000), "n": 1}


def test_when_busy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """``skip`` gives None, ``raise`` raises and begins nothing, ``wait`` holds the thread and says why after 1 s."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.prepare(STATE)
        with hold(ckpt):
            first = ckpt.save(0, STATE)
            skipped = ckpt.save(1, STATE, when_busy="skip")
            assert skipped.result(1) is None
            assert skipped.phase == "skipped"
            with pytest.raises(aiockpt.SaveBusyError) as caught:
                ckpt.save(2, STATE, when_busy="raise")
            assert (caught.value.step, caught.value.busy_step) == (2, 0)
            with pytest.raises(aiockpt.SaveBusyError):
                ckpt.save(3, STATE, timeout=0.05)
            assert not first.done()
            waiting = threading.Thread(target=lambda: ckpt.save(4, STATE))
            waiting.start()
            wait_until(lambda: "holds its thread" in caplog.text, "the warning")
            assert waiting.is_alive()
        waiting.join(60)
    assert blocking.steps(tmp_path) == [0, 4]


def test_an_existing_step(tmp_path: Path) -> None:
    """Refused without overwrite; with it the new one replaces the old one as a whole."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.save(5, {"n": 1}).result(60)
        with pytest.raises(aiockpt.StepExistsError) as caught:
            ckpt.save(5, {"n": 2})
        assert caught.value.step == 5
        assert "overwrite=True" in str(caught.value)
        ckpt.save(5, {"n": 3}, overwrite=True).result(60)
        assert ckpt.load(5) == {"n": 3}
        with pytest.raises(aiockpt.StepExistsError):
            ckpt.save(5, {"n": 4})
    assert [name for name in os.listdir(tmp_path) if name.startswith((".old", ".step"))] == []


def test_keep_latest(tmp_path: Path) -> None:
    """Older checkpoints go after a commit, and only then."""
    with blocking.Checkpointer(tmp_path, keep=aiockpt.Latest(2)) as ckpt:
        for step in range(5):
            ckpt.save(step, STATE).result(60)
            assert ckpt.steps() == list(range(max(0, step - 1), step + 1))


def test_cancel_before_the_commit(tmp_path: Path) -> None:
    """A cancelled save leaves nothing, frees its slot, and is told to nobody but who awaits it."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.prepare(STATE)
        with hold(ckpt):
            save = ckpt.save(0, STATE)
            save.cancel()
        with pytest.raises(aiockpt.SaveCancelledError):
            save.result(60)
        assert save.phase == "cancelled"
        ckpt.save(1, STATE).result(60)
        assert ckpt.steps() == [1]
    assert [name for name in os.listdir(tmp_path) if name.startswith(".step")] == []


def test_cancel_after_the_commit_has_no_effect(tmp_path: Path) -> None:
    """The outcome says which came first."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        save = ckpt.save(0, STATE)
        save.result(60)
        save.cancel()
        assert save.result(60).step == 0


def test_timeout_of_a_save(tmp_path: Path) -> None:
    """``save(timeout=)`` gives the save up, unlike the timeout of a wait; unheard, the next save raises it once."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.prepare(STATE)
        with hold(ckpt):
            save = ckpt.save(0, STATE, timeout=0.1)
            wait_until(lambda: save._record.cancelling, "the time-out")
        wait_until(save.done, "the outcome")
        with pytest.raises(aiockpt.SaveTimeoutError) as caught:
            ckpt.save(1, STATE)
        assert (caught.value.step, caught.value.timeout) == (0, 0.1)
        assert any("step 1 was not begun" in note for note in caught.value.__notes__)
        ckpt.save(1, STATE).result(60)
        assert ckpt.steps() == [1]


def test_timeout_while_the_arena_is_made(tmp_path: Path) -> None:
    """The save is given up though its thread still waits for shared memory; the slot comes back."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        saves: list[Any] = []
        with hold(ckpt):
            thread = threading.Thread(target=lambda: saves.append(ckpt.save(0, STATE, timeout=0.1)))
            thread.start()
            wait_until(lambda: ckpt.statistics().failed, "the time-out")
        thread.join(60)
        with pytest.raises(aiockpt.SaveTimeoutError):
            saves[0].result(60)
        ckpt.save(1, STATE, timeout=30).result(60)
        assert ckpt.steps() == [1]


def test_a_failure_that_was_awaited_is_not_told_again(tmp_path: Path) -> None:
    """Who awaited it knows; neither the next save nor close raises it."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.prepare(STATE)
        with hold(ckpt):
            save = ckpt.save(0, STATE, timeout=0.05)
            wait_until(lambda: save._record.cancelling, "the time-out")
        with pytest.raises(aiockpt.SaveTimeoutError):
            save.result(60)
        ckpt.save(1, STATE).result(60)


def test_close_raises_what_nobody_heard(tmp_path: Path) -> None:
    """The last save's failure arrives at the end of the block."""
    with pytest.raises(aiockpt.SaveTimeoutError), blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.prepare(STATE)
        with hold(ckpt):
            save = ckpt.save(0, STATE, timeout=0.05)
            wait_until(lambda: save._record.cancelling, "the time-out")


def test_due_and_request_save(tmp_path: Path) -> None:
    """A request stands until a save begins; it is safe in a signal handler."""
    with blocking.Checkpointer(tmp_path, every=aiockpt.Every(steps=10)) as ckpt:
        assert ckpt.due(0) is None
        assert ckpt.due(9) == "every 10 steps"
        ckpt.request_save("SIGTERM")
        assert ckpt.due(1) == ckpt.due(2) == "SIGTERM"
        ckpt.save(2, STATE).result(60)
        assert ckpt.due(3) is None


def test_one_line_per_commit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """INFO is one line per checkpoint."""
    with caplog.at_level(logging.INFO, "aiockpt"), blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.save(0, STATE).result(60)
        assert sum("step 0 saved" in record.message for record in caplog.records) == 1


def test_statistics(tmp_path: Path) -> None:
    """The counters count; a loop over one state makes one plan."""
    training = Training()
    training.step()
    with blocking.Checkpointer(tmp_path) as ckpt:
        for step in range(3):
            ckpt.save(step, training.state).result(60)
            training.step()
        found = ckpt.statistics()
        assert (found.committed, found.failed, found.plans, found.worker_restarts) == (3, 0, 1, 0)
        assert found.arena_nbytes > 0
        assert found.worker_pid is not None
        assert is_alive(found.worker_pid)


def test_growing_and_shrinking_states(tmp_path: Path) -> None:
    """A larger state gets a larger arena, a smaller one uses the one that is there."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        for step, count in enumerate((10, 100_000, 7, 0, 200_000)):
            ckpt.save(step, {"x": torch.arange(count)}).result(60)
            assert torch.equal(ckpt.load(step)["x"], torch.arange(count))


def test_an_empty_state(tmp_path: Path) -> None:
    """Nothing to save is a checkpoint too."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.save(0, {}).result(60)
        assert ckpt.load(0) == {}


HOLDER = """
    import sys, torch, aiockpt
    with aiockpt.blocking.Checkpointer(sys.argv[1]) as ckpt:
        print("open", flush=True)
        sys.stdin.read()
"""


def test_a_second_job_from_another_process(tmp_path: Path) -> None:
    """Refused after a few seconds of waiting, naming the owner's host and process; nothing is left behind."""
    with start_script(HOLDER, tmp_path, stdin=-1) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(aiockpt.ConfigError) as caught:
            blocking.Checkpointer(tmp_path).open()
        assert str(holder.pid) in str(caught.value)
        assert "next:" in str(caught.value)
    with blocking.Checkpointer(tmp_path) as ckpt:
        assert ckpt.steps() == []


def test_closing_ends_the_wait_for_a_run(tmp_path: Path) -> None:
    """Whoever waits for another job's lock need not wait it out to be closed."""
    with start_script(HOLDER, tmp_path, stdin=-1) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"

        async def body() -> float:
            began = anyio.current_time()
            with anyio.move_on_after(0.2):
                await aiockpt.Checkpointer(tmp_path).open()
            return anyio.current_time() - began

        assert anyio.run(body) < 3


def test_a_slow_disk_is_left_alone(tmp_path: Path) -> None:
    """Every write takes longer than stall_timeout and io_timeout allow in all, but each of them ends."""
    rule = FaultRule(point=FaultPoint.WORKER_BLOCK_WRITE, action="delay", nth=0, seconds=0.6)
    ckpt = blocking.Checkpointer(tmp_path, stall_timeout=1.0, io_timeout=2.0)
    ckpt._coordinator.worker_faults = (WORKER_ARGUMENT, FaultPlan(rules=[rule]).to_json())
    ckpt.open()
    state = {f"f{i}": {"x": torch.arange(10)} for i in range(12)}
    assert ckpt.save(0, state).result(60).timings["durable"] > 0.6
    assert ckpt.statistics().worker_restarts == 0
    ckpt.close()


def test_a_hanging_disk_is_not(tmp_path: Path) -> None:
    """One write that never ends: after io_timeout the worker is replaced though its loop lives, the save retried."""
    rule = FaultRule(point=FaultPoint.WORKER_BLOCK_WRITE, action="delay", seconds=3600)
    ckpt = blocking.Checkpointer(tmp_path, io_timeout=1.0)
    ckpt._coordinator.worker_faults = (WORKER_ARGUMENT, FaultPlan(rules=[rule]).to_json())
    ckpt.open()
    ckpt._coordinator._supervisor.faults = None
    assert ckpt.save(0, STATE).result(60).step == 0
    assert ckpt.statistics().worker_restarts == 1
    ckpt.close()


def test_the_worker_imports_no_torch(tmp_path: Path) -> None:
    """Nor numpy: no shared library of either is mapped by it."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.save(0, STATE).result(60)
        maps = Path(f"/proc/{ckpt.statistics().worker_pid}/maps").read_text()
        assert "msgspec" in maps
        assert "torch" not in maps
        assert "numpy" not in maps


def test_prepare_makes_room_for_state_that_optimizers_do_not_have_yet(tmp_path: Path) -> None:
    """The usual order: restore, prepare, train. The first save finds memory enough."""
    module = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(module.parameters())
    state = {"model": module, "optimizer": optimizer}
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.restore(state)
        ckpt.prepare(state)
        made = ckpt.statistics().arena_nbytes
        module(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        ckpt.save(0, state).result(60)
        assert ckpt.statistics().arena_nbytes == made
