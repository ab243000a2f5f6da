"""Who dies, and what stands afterwards: real processes, real signals."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest
import torch

import aiockpt
from aiockpt import blocking
from tests.support import (
    Training,
    assert_same,
    attempts,
    is_alive,
    start_script,
    stopped,
    wait_until,
)

pytestmark = pytest.mark.process

STATE = {"x": torch.arange(100_000), "n": 1}


def worker_of(ckpt: blocking.Checkpointer) -> int:
    pid = ckpt.statistics().worker_pid
    assert pid is not None
    return pid


def test_a_killed_worker_is_replaced_and_its_save_retried(tmp_path: Path) -> None:
    """The state may change meanwhile: the retry writes the snapshot that lies in the arena."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        training = Training()
        training.step()
        ckpt.prepare(training.state)
        pid = worker_of(ckpt)
        with stopped(pid):
            save = ckpt.save(0, training.state)
            save.wait_staged()
            expected = training.snapshot()
            training.step()
            os.kill(pid, signal.SIGKILL)
            assert save.result(60).step == 0
        assert worker_of(ckpt) != pid
        assert ckpt.statistics().worker_restarts == 1
        fresh = Training(seed=1)
        ckpt.restore(fresh.state)
        assert_same(expected, fresh.snapshot())
    assert attempts(tmp_path) == []


def test_a_worker_killed_between_saves_is_replaced(tmp_path: Path) -> None:
    """Noticed at once, not at the next save; the arena is handed over."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.save(0, STATE).result(60)
        pid = worker_of(ckpt)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: ckpt.statistics().worker_pid not in (None, pid), "a new worker")
        ckpt.save(1, STATE).result(60)
        assert ckpt.steps() == [0, 1]


def test_two_deaths_on_one_save_fail_it(tmp_path: Path) -> None:
    """The save's own doing, most likely; the next save has a fresh worker."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.prepare(STATE)
        first = worker_of(ckpt)
        os.kill(first, signal.SIGSTOP)
        save = ckpt.save(0, STATE)
        os.kill(first, signal.SIGKILL)
        second = wait_until(lambda: ckpt.statistics().worker_pid not in (None, first) and worker_of(ckpt), "a worker")
        os.kill(second, signal.SIGKILL)
        try:
            save.result(60)
        except aiockpt.WorkerExitedError as exc:
            assert exc.step == 0
            assert exc.exit_status == -signal.SIGKILL
        else:  # the second one was quick enough to commit
            assert ckpt.steps() == [0]
        ckpt.save(1, STATE).result(60)


def test_the_restart_limit(tmp_path: Path) -> None:
    """Used up, every save says so; training is unharmed and close works."""
    with blocking.Checkpointer(tmp_path, restart=aiockpt.RestartPolicy(tries=0)) as ckpt:
        ckpt.save(0, STATE).result(60)
        os.kill(worker_of(ckpt), signal.SIGKILL)
        wait_until(lambda: ckpt.statistics().worker_pid is None, "the end of the worker")
        for _ in range(2):
            with pytest.raises(aiockpt.RestartLimitError):
                wait_until(lambda: ckpt.save(1, STATE).result(60) and None, "the refusal")
    assert blocking.steps(tmp_path) == [0]


def test_a_stopped_worker_is_replaced_after_the_stall_timeout(tmp_path: Path) -> None:
    """SIGSTOP looks like a hanging machine: killed, replaced behind the fence, the save retried."""
    with blocking.Checkpointer(tmp_path, stall_timeout=1.0) as ckpt:
        ckpt.prepare(STATE)
        pid = worker_of(ckpt)
        os.kill(pid, signal.SIGSTOP)
        assert ckpt.save(0, STATE).result(60).step == 0
        assert not is_alive(pid)


TRAINER = """
    import sys, torch, aiockpt
    from tests.support import Training
    run, mode = sys.argv[1:3]
    training = Training(width=512)
    with aiockpt.blocking.Checkpointer(run, keep=aiockpt.Latest(3)) as ckpt:
        resumed = ckpt.restore(training.state)
        ckpt.prepare(training.state)
        print("resumed", resumed.step if resumed else -1, ckpt.statistics().worker_pid, flush=True)
        for step in range(resumed.step + 1 if resumed else 0, 10_000):
            loss = training.step()
            save = ckpt.save(step, training.state)
            print("saving", step, loss, flush=True)
            if mode == "staged":
                save.wait_staged()
                save._record.wait_handed_over(60)
                print("staged", step, flush=True)
                sys.stdin.read()
"""


def test_a_staged_save_survives_its_trainer(tmp_path: Path) -> None:
    """The worker has everything: it commits, and ends."""
    trainer = start_script(TRAINER, tmp_path, "staged", stdin=-1)
    assert trainer.stdout is not None
    worker = int(trainer.stdout.readline().split()[2])
    while not trainer.stdout.readline().startswith("staged"):
        pass
    trainer.kill()
    trainer.communicate()
    wait_until(lambda: not is_alive(worker), "the worker's end")
    assert blocking.steps(tmp_path) == [0]
    assert attempts(tmp_path) == []


NURSERY = f"""
    import os, sys, torch, torch._dynamo, aiockpt
    from tests.support import Training
    train = {TRAINER.partition("run, mode")[2].partition(chr(10))[2]!r}
    import textwrap
    for line in sys.stdin:
        if os.fork() == 0:  # a trainer that need not import torch
            run, mode = sys.argv[1], "loop"
            print("pid", os.getpid(), flush=True)
            exec(textwrap.dedent(train))
        os.wait()
"""


def test_a_trainer_killed_and_restarted_at_once_resumes(tmp_path: Path) -> None:
    """Twenty times in a loop: each opens at once, waits for its predecessor's worker, and loses nothing committed."""
    highest = -1
    workers = []
    with start_script(NURSERY, tmp_path, stdin=-1, stderr=None) as nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        for round_number in range(20):
            nursery.stdin.write("next\n")
            nursery.stdin.flush()
            while not (line := nursery.stdout.readline()).startswith("pid"):
                assert line  # what the one before had printed
            pid = int(line.split()[1])
            word, resumed, worker = nursery.stdout.readline().split()
            assert word == "resumed"
            workers.append(int(worker))
            assert int(resumed) >= highest, round_number
            highest = int(resumed)
            for _ in range(1 + round_number % 3):
                assert nursery.stdout.readline().startswith("saving")
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(is_alive(pid) for pid in workers), "the workers' end")
    assert highest > 0
    assert attempts(tmp_path) == []


def test_ctrl_c_reaches_the_trainer_alone(tmp_path: Path) -> None:
    """SIGINT to the whole group: the trainer unwinds, drains, and the worker has written everything."""
    trainer = start_script(TRAINER, tmp_path, "loop", start_new_session=True)
    assert trainer.stdout is not None
    worker = int(trainer.stdout.readline().split()[2])
    for _ in range(3):
        trainer.stdout.readline()
    os.killpg(trainer.pid, signal.SIGINT)
    os.kill(worker, signal.SIGINT)
    out, err = trainer.communicate(timeout=60)
    assert "KeyboardInterrupt" in err
    last = [int(line.split()[1]) for line in out.splitlines() if line.startswith("saving")]
    wait_until(lambda: not is_alive(worker), "the worker's end")
    assert max(blocking.steps(tmp_path)) >= max(last, default=2)
    assert attempts(tmp_path) == []


LOADER = """
    import sys, torch, aiockpt
    from torch.utils.data import DataLoader, TensorDataset
    with aiockpt.blocking.Checkpointer(sys.argv[1]) as ckpt:
        state = {"x": torch.arange(1000)}
        ckpt.prepare(state)
        loader = DataLoader(TensorDataset(torch.arange(100)), num_workers=2, persistent_workers=True,
                            multiprocessing_context="fork")
        batches = iter(loader)
        next(batches)
        save = ckpt.save(0, state)
        save.wait_staged()
        save._record.wait_handed_over(60)
        children = [w.pid for w in batches._workers]
        print(ckpt.statistics().worker_pid, *children, flush=True)
        sys.stdin.read()
"""


def test_forked_loader_children_do_not_hide_the_trainers_death(tmp_path: Path) -> None:
    """They may hold what they inherited: the worker goes by the pidfd, finishes the save, and ends."""
    trainer = start_script(LOADER, tmp_path, stdin=-1)
    assert trainer.stdout is not None
    line = trainer.stdout.readline()
    assert line, trainer.communicate()
    worker, *children = map(int, line.split())
    for pid in children:
        os.kill(pid, signal.SIGSTOP)  # they would notice by themselves, and let go
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not is_alive(worker), "the worker's end")
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    trainer.communicate()
    assert blocking.steps(tmp_path) == [0]


def resident_nbytes() -> int:
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_twenty_in_turn_and_four_at_once_leave_nothing(tmp_path: Path) -> None:
    """Memory is flat; so are descriptors, threads and children, see the leak check around this test."""
    resident = []
    for turn in range(20):
        with blocking.Checkpointer(tmp_path / "turn") as ckpt:
            ckpt.save(turn, STATE)
        resident.append(resident_nbytes())
    assert resident[-1] - resident[4] < 8 << 20, resident
    assert blocking.steps(tmp_path / "turn") == list(range(20))
    many = [blocking.Checkpointer(tmp_path / f"run{i}") for i in range(4)]
    for ckpt in many:
        ckpt.open()
    saves = [ckpt.save(0, STATE) for ckpt in many]
    assert [save.result(60).step for save in saves] == [0] * 4
    for ckpt in many:
        ckpt.close()
