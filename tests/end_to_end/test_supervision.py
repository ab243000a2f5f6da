"""Who watches whom: stalls, madness and deaths of workers, and trainers that are stopped, killed, restarted."""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import aiockpt
from aiockpt import blocking
from aiockpt.storage.faults import FaultPoint
from aiockpt.testing.faults import WORKER_ARGUMENT, FaultPlan, FaultRule
from tests.helpful import assert_helpful
from tests.support import attempts, is_alive, start_script, wait_until
from tests.worker.driver import state_of

pytestmark = pytest.mark.process

STATE: dict[str, Any] = {"x": torch.arange(100_000), "n": 1}
OLD: dict[str, Any] = {"x": torch.zeros(100_000, dtype=torch.int64), "n": 0}


def worker_of(ckpt: blocking.Checkpointer) -> int:
    pid = ckpt.statistics().worker_pid
    assert pid is not None
    return pid


def opened(run: Path, faults: tuple[str, str], **options: Any) -> blocking.Checkpointer:
    """Open a run whose workers all have this fault layer, until the test takes it away."""
    ckpt = blocking.Checkpointer(run, **options)
    ckpt._coordinator.worker_faults = faults
    ckpt.open()
    return ckpt


def stalling(point: FaultPoint) -> tuple[str, str]:
    return WORKER_ARGUMENT, FaultPlan(rules=[FaultRule(point=point, action="stall")]).to_json()


def heal(ckpt: blocking.Checkpointer) -> None:
    """Let the next workers be sound."""
    ckpt._coordinator._supervisor.faults = None


STALLS = [FaultPoint.WORKER_BLOCK_WRITE, FaultPoint.WORKER_BEFORE_RENAME, FaultPoint.WORKER_OLD_ASIDE]
STALLS += [FaultPoint.WORKER_AFTER_RENAME]


@pytest.mark.parametrize("point", STALLS)
def test_a_worker_that_stalls_in_mid_save(point: FaultPoint, tmp_path: Path) -> None:
    """Killed after ``stall_timeout`` and replaced behind the fence; the save is committed once, whatever was done."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.save(0, OLD).result(60)
    with closing(opened(tmp_path, stalling(point), stall_timeout=1.0)) as ckpt:
        heal(ckpt)
        pid = worker_of(ckpt)
        assert ckpt.save(0, STATE, overwrite=True).result(60).step == 0
        assert not is_alive(pid)
        assert ckpt.statistics().worker_restarts == 1
        assert ckpt.load(0)["n"] == 1
        assert ckpt.verify(0) > STATE["x"].nbytes
    assert attempts(tmp_path) == []
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".old.")]


def test_two_deaths_with_last_words(tmp_path: Path) -> None:
    """The error names the save, the signal, and what the second worker said last; the next save has a sound worker."""
    with closing(opened(tmp_path, stalling(FaultPoint.WORKER_BLOCK_WRITE))) as ckpt:
        save = ckpt.save(0, STATE)
        pids: set[int] = set()
        for death in range(2):
            pid = wait_until(lambda: ckpt.statistics().worker_pid not in (None, *pids) and worker_of(ckpt), "a worker")
            pids.add(pid)
            wait_until(lambda pid=pid: state_of(pid) == "T", "the worker to stop in its write")
            if death:
                heal(ckpt)
            os.kill(pid, signal.SIGSEGV)
            os.kill(pid, signal.SIGCONT)
        with pytest.raises(aiockpt.WorkerExitedError) as caught:
            save.result(60)
        assert_helpful(caught.value, aiockpt.WorkerExitedError, exit_status=-signal.SIGSEGV, step=0)
        assert "Segmentation fault" in (caught.value.stderr or "")
        assert "2 workers died on it" in str(caught.value)
        ckpt.save(1, STATE).result(60)
        assert ckpt.steps() == [1]


def test_a_worker_that_goes_mad_in_mid_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What it says is no message: it is replaced, and its save retried."""
    with closing(opened(tmp_path, ("tests.worker.odd_faults:Mad", ""))) as ckpt:
        heal(ckpt)
        pid = worker_of(ckpt)
        assert ckpt.save(0, STATE).result(60).step == 0
        assert not is_alive(pid)
        assert ckpt.statistics().worker_restarts == 1
        assert torch.equal(ckpt.load(0)["x"], STATE["x"])
    assert "a frame was not understood" in caplog.text


def test_restarts_are_delayed_as_the_policy_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first one at once, which is soon noticed, the second one later, with a line in the log."""
    policy = aiockpt.RestartPolicy(delays=(0.0, 1.0))
    with blocking.Checkpointer(tmp_path, restart=policy) as ckpt:
        taken = []
        for _ in range(2):
            pid = worker_of(ckpt)
            began = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: ckpt.statistics().worker_pid not in (None, pid), "another worker")
            taken.append(time.monotonic() - began)
            ckpt.save(len(taken), STATE).result(60)
        assert taken[0] < 10
        assert taken[1] >= 1.0
    assert ["started again in 0.0 s" in caplog.text, "started again in 1.0 s" in caplog.text] == [True, True]


TRAINER = """
    import sys, torch, aiockpt
    from aiockpt.testing.faults import WORKER_ARGUMENT
    ckpt = aiockpt.blocking.Checkpointer(sys.argv[1], stall_timeout=1.0)
    if sys.argv[2]:
        ckpt._coordinator.worker_faults = (WORKER_ARGUMENT, sys.argv[2])
    with ckpt:
        state = {"x": torch.arange(100_000), "n": 1}
        ckpt.prepare(state)
"""


def test_a_trainer_that_was_stopped_kills_nobody(tmp_path: Path) -> None:
    """Time passed, and signs of life lie in the socket: on waking up it takes its worker for what it is."""
    code = (
        TRAINER
        + """
        ckpt.save(0, state).result(60)
        for line in sys.stdin:
            print(ckpt.statistics().worker_pid, ckpt.statistics().worker_restarts, flush=True)
    """
    )
    with start_script(code, tmp_path, "", stdin=-1) as trainer:
        assert trainer.stdin is not None
        assert trainer.stdout is not None

        def ask() -> list[int]:
            trainer.stdin.write("who\n")
            trainer.stdin.flush()
            return [int(word) for word in trainer.stdout.readline().split()]

        pid, _ = ask()
        trainer.send_signal(signal.SIGSTOP)
        threading.Event().wait(3.0)  # three times stall_timeout
        trainer.send_signal(signal.SIGCONT)
        asked = [ask() for _ in range(3) if not threading.Event().wait(0.3)]
        assert asked == [[pid, 0]] * 3
        trainer.communicate(timeout=60)


def test_a_restart_resumes_from_what_its_predecessors_worker_commits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed while its worker writes, and opened anew at once: that waits, says so, and finds the save."""
    caplog.set_level(logging.INFO, "aiockpt.run")
    slow = FaultPlan(rules=[FaultRule(point=FaultPoint.WORKER_FILE_SYNC, action="delay", seconds=1.5)]).to_json()
    code = (
        TRAINER
        + """
        save = ckpt.save(7, state)
        save.wait_staged()
        save._record.wait_handed_over(60)
        print("staged", flush=True)
        sys.stdin.read()
    """
    )
    trainer = start_script(code, tmp_path, slow, stdin=-1)
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "staged\n"
    trainer.kill()
    with blocking.Checkpointer(tmp_path) as ckpt:
        state = {"x": torch.zeros(100_000, dtype=torch.int64), "n": 0}
        resumed = ckpt.restore(state)
        assert resumed is not None
        assert (resumed.step, state["n"]) == (7, 1)
        assert torch.equal(state["x"], STATE["x"])
    trainer.communicate()
    assert "waiting for a former job's worker" in caplog.text
    assert attempts(tmp_path) == []


LOADER = """
    import sys, torch, aiockpt
    from torch.utils.data import DataLoader, TensorDataset
    with aiockpt.blocking.Checkpointer(sys.argv[1]) as ckpt:
        ckpt.save(0, {"x": torch.arange(1000)}).result(60)
        loader = DataLoader(TensorDataset(torch.arange(100)), num_workers=2, persistent_workers=True,
                            multiprocessing_context="fork")
        batches = iter(loader)
        next(batches)
        print(ckpt.statistics().worker_pid, *(child.pid for child in batches._workers), flush=True)
        sys.stdin.read()
"""


@contextmanager
def watched(*pids: int) -> Iterator[list[int]]:
    """Descriptors that are readable when the processes have ended."""
    fds = [os.pidfd_open(pid) for pid in pids]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def seconds_to_notice(run: Path) -> float:
    """Return how long after the kernel's report of its trainer's death an idle worker has ended.

    The trainer's DataLoader children live on with every descriptor that they inherited.
    """
    trainer = start_script(LOADER, run, stdin=-1)
    assert trainer.stdout is not None
    worker, *children = map(int, trainer.stdout.readline().split())
    with watched(trainer.pid, worker) as (trainer_end, worker_end):
        for pid in children:
            os.kill(pid, signal.SIGSTOP)  # they would notice by themselves, and let go
        trainer.kill()
        assert select.select([trainer_end], [], [], 60)[0]
        reported_at = time.perf_counter()
        assert select.select([worker_end], [], [], 60)[0]
        took = time.perf_counter() - reported_at
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    trainer.communicate()
    return took


@pytest.mark.parametrize(
    ("rounds", "slack"), [pytest.param(5, 1.0, marks=pytest.mark.timing, id="exact"), pytest.param(1, 10.0, id="slack")]
)
def test_death_is_noticed_though_loader_children_hold_the_socket(rounds: int, slack: float, tmp_path: Path) -> None:
    """Within 50 ms of the kernel's report."""
    took = sorted(seconds_to_notice(tmp_path / str(turn)) for turn in range(rounds))
    assert took[rounds // 2] < 0.05 * slack
