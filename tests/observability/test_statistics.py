"""``statistics()`` of a run, through the real worker."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
import torch

import aiockpt
from aiockpt import blocking
from aiockpt.staging.pending import PendingCopies
from tests.observability.recorder import Recorder
from tests.support import Training, stopped, wait_until

pytestmark = pytest.mark.process

STATE: dict[str, Any] = {"x": torch.arange(1000), "n": 1}
"""8,000 bytes of tensors."""


def worker_of(ckpt: blocking.Checkpointer) -> int:
    pid = ckpt.statistics().worker_pid
    assert pid is not None
    return pid


def test_a_run_in_figures(tmp_path: Path) -> None:
    """Every save counts in each phase; bytes, rates, arena and worker have their figures."""
    before = time.time()
    with blocking.Checkpointer(tmp_path, capacity=1 << 30) as ckpt:
        timings = [ckpt.save(step, STATE).result(60).timings for step in range(3)]
        ckpt.wait_ready()
        found = ckpt.statistics()
        assert (found.committed, found.failed, found.in_flight, found.plans) == (3, 0, 0, 1)
        assert (found.last_step, found.staged_nbytes) == (2, 3 * 8000)
        assert found.last_committed_at is not None
        assert before <= found.last_committed_at <= time.time()
        assert found.written_nbytes >= found.committed_nbytes > 3 * 8000
        for name in ("blocked", "staged", "durable", "collect", "stage", "write", "sync", "commit"):
            durations = getattr(found.phases, name)
            seconds = [timing[name] for timing in timings]
            assert durations.count == 3, name
            assert durations.last_s == seconds[-1], name
            assert durations.max_s == max(seconds), name
            assert durations.total_s == pytest.approx(sum(seconds)), name
        assert found.phases.reserve.count == 1  # the first save made the shared memory
        assert found.phases.durable.last_s > found.phases.write.last_s
        assert found.stage_rate.nbytes == 3 * 8000
        assert found.stage_rate.gbps > 0
        assert found.write_rate.nbytes == found.committed_nbytes
        assert found.write_rate.last_gbps > 0
        assert found.arena_capacity == 1 << 30
        assert found.arena_nbytes > 8000
        assert (found.arena_used_nbytes, found.arena_pinned) == (0, False)
        assert found.worker_private_nbytes is not None
        assert 4 << 20 < found.worker_private_nbytes < 200 << 20
        assert (found.worker_restarts, found.dropped_answers, found.dropped_spans) == (0, 0, 0)
        assert msgspec.json.decode(msgspec.json.encode(found), type=aiockpt.Statistics) == found


def test_both_faces_have_it(tmp_path: Path) -> None:
    """A plain call in both."""

    async def body() -> None:
        async with aiockpt.Checkpointer(tmp_path) as ckpt:
            await ckpt.save(0, STATE)
            assert ckpt.statistics().committed == 1

    anyio.run(body)


def test_a_save_in_flight(tmp_path: Path) -> None:
    """Seen while it is written, with what it takes of the arena; the next one's wait for it counts."""
    recorder = Recorder()
    with blocking.Checkpointer(tmp_path, observer=recorder) as ckpt:
        ckpt.prepare(STATE)
        with stopped(worker_of(ckpt)):
            save = ckpt.save(0, STATE)
            save.wait_staged()
            found = ckpt.statistics()
            assert (found.in_flight, found.committed) == (1, 0)
            assert 8000 < found.arena_used_nbytes <= found.arena_nbytes
            assert (found.phases.staged.count, found.phases.durable.count) == (1, 0)
            waiting = threading.Thread(target=lambda: ckpt.save(1, STATE))
            waiting.start()
            wait_until(lambda: any(span.name == "wait" for span in recorder.begun), "the second save to wait")
        waiting.join(60)
        ckpt.wait_idle()
        ckpt.wait_ready()
        found = ckpt.statistics()
        assert (found.in_flight, found.arena_used_nbytes, found.phases.wait.count) == (0, 0, 1)


def test_saves_that_are_no_checkpoint(tmp_path: Path) -> None:
    """Skipped, cancelled, timed out: each has its counter."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.prepare(STATE)
        with stopped(worker_of(ckpt)):
            cancelled = ckpt.save(0, STATE)
            ckpt.save(1, STATE, when_busy="skip")
            cancelled.cancel()
        with pytest.raises(aiockpt.SaveCancelledError):
            cancelled.result(60)
        ckpt.wait_ready()
        with stopped(worker_of(ckpt)):
            late = ckpt.save(2, STATE, timeout=0.05)
            wait_until(lambda: late._record.cancelling, "the time-out")
        with pytest.raises(aiockpt.SaveTimeoutError):
            late.result(60)
        found = ckpt.statistics()
        assert (found.skipped, found.cancelled, found.failed, found.torn, found.committed) == (1, 1, 1, 0, 0)


def test_a_torn_snapshot(tmp_path: Path) -> None:
    """Counted as failed and as torn."""
    training = Training(width=600)
    with blocking.Checkpointer(tmp_path) as ckpt:
        training.step()
        ckpt.save(0, training.state).result(60)
        training.step()
        with held_copies(ckpt):
            save = ckpt.save(1, training.state)
            with torch.no_grad():
                for parameter in training.model.parameters():
                    parameter.add_(1)
        with pytest.raises(aiockpt.TornSnapshotError):
            save.result(60)
        found = ckpt.statistics()
        assert (found.failed, found.torn, found.committed) == (1, 1, 1)


@contextmanager
def held_copies(ckpt: blocking.Checkpointer) -> Iterator[threading.Event]:
    """Keep the copy thread from copying until the event is set, or the block is left."""
    go_on = threading.Event()

    def hold() -> None:
        go_on.wait(60)

    ckpt._coordinator._stager._thread.post(hold)
    try:
        yield go_on
    finally:
        go_on.set()


def is_waiting_for_a_copy(thread: threading.Thread) -> bool:
    """Whether the thread is inside of the guard's wait."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code is not PendingCopies._wait.__code__:
        frame = frame.f_back
    return frame is not None


def test_the_wait_of_a_step(tmp_path: Path) -> None:
    """What ``optimizer.step()`` waits for a copy under the guard is shown; steps that need not wait do not count."""
    training = Training(width=600)
    with blocking.Checkpointer(tmp_path) as ckpt:
        training.step()
        ckpt.save(0, training.state).result(60)
        training.step()
        assert ckpt.statistics().guard_wait.count == 0
        with held_copies(ckpt) as go_on:
            save = ckpt.save(1, training.state)
            stepping = threading.Thread(target=training.step)
            stepping.start()
            wait_until(lambda: is_waiting_for_a_copy(stepping), "the step to wait")
            go_on.set()
            stepping.join(60)
        save.result(60)
        waited = ckpt.statistics().guard_wait
        assert waited.count == 1
        assert waited.total_s == waited.last_s == waited.max_s > 0
        training.step()
        assert ckpt.statistics().guard_wait.count == 1


def test_a_save_that_was_begun_again(tmp_path: Path) -> None:
    """The death shows as a restart and a retry; bytes that were written twice count twice."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.prepare(STATE)
        pid = worker_of(ckpt)
        with stopped(pid):
            save = ckpt.save(0, STATE)
            save.wait_staged()
            os.kill(pid, signal.SIGKILL)
            save.result(60)
        found = ckpt.statistics()
        assert (found.committed, found.retried, found.worker_restarts, found.failed) == (1, 1, 1, 0)
        assert found.worker_pid != pid


def test_asking_reads_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be asked at every step, and from a scrape's thread while a save runs."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        save = ckpt.save(0, STATE)
        me, opened = threading.get_ident(), []
        for name, real in (("builtins.open", open), ("os.open", os.open)):

            def watched(path: Any, *args: Any, real: Any = real, **kwargs: Any) -> Any:
                if threading.get_ident() == me:
                    opened.append(path)
                return real(path, *args, **kwargs)

            monkeypatch.setattr(name, watched)
        ckpt.statistics()
        monkeypatch.undo()
        assert opened == []
        save.result(60)
