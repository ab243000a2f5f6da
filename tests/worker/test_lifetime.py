"""When a worker ends, and what it finishes before."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from aiockpt.protocol.messages import Close, Closed, Progress, SlotFree
from tests.files import names
from tests.waiting import wait_until
from tests.worker.driver import (
    Ended,
    Save,
    Worker,
    check_checkpoint,
    mortal_trainer,
    rule,
    snapshot,
    state_of,
    worker,
)

pytestmark = pytest.mark.process

ORPHANED, LINGERED = 64, 67


def test_a_staged_save_outlives_its_trainer(tmp_path: Path) -> None:
    """It is committed although a forked child of the trainer holds the socket: the pidfd says who is dead."""
    run = tmp_path / "run"
    save = Save(snapshot(), step=1)
    with (
        mortal_trainer() as trainer,
        worker(run, trainer_pidfd=trainer.pidfd, faults=rule("worker.block_write", "delay", seconds=0.3)) as child,
    ):
        child.start_save(save)
        child.next_where(lambda m: isinstance(m, Progress) and m.state == "staged")
        trainer.die()
        assert child.wait() == ORPHANED  # this process holds the socket open all the time
    check_checkpoint(run / "step-1", save)


def test_the_end_of_staging_in_the_socket_counts(tmp_path: Path) -> None:
    """What the trainer had sent and the worker had not read yet is read first, a whole save if need be."""
    run = tmp_path / "run"
    save = Save(snapshot(), step=1)
    with mortal_trainer() as trainer, worker(run, trainer_pidfd=trainer.pidfd) as child:
        assert child.reserve(save.shot.plan.arena_nbytes).error is None
        os.kill(child.pid, signal.SIGSTOP)
        wait_until(lambda: state_of(child.pid) == "T", "the stop")
        child.start_save(save)
        trainer.die()
        os.kill(child.pid, signal.SIGCONT)
        assert child.wait() == ORPHANED
    check_checkpoint(run / "step-1", save)


@pytest.mark.parametrize("how", ["death", "end of file"])
def test_a_half_staged_save_is_removed(tmp_path: Path, how: str) -> None:
    """Its bytes are on the disk, and nobody will say that they are all."""
    run = tmp_path / "run"
    save = Save(snapshot(), step=1)
    with mortal_trainer() as trainer, worker(run, trainer_pidfd=trainer.pidfd) as child:
        child.commit(Save(snapshot(), step=0))
        child.begin(save)
        child.stage(save)
        child.next_where(lambda m: isinstance(m, Progress) and m.save_id == save.save_id)
        if how == "death":
            trainer.die()
        else:
            child.socket.shutdown(1)
        assert child.wait() == ORPHANED
    assert sorted(os.listdir(run)) == [".lock", "step-0"]


def test_death_before_hello(tmp_path: Path) -> None:
    """A trainer that dies at once leaves no worker behind."""
    with mortal_trainer() as trainer, worker(tmp_path / "run", trainer_pidfd=trainer.pidfd, ready=False) as child:
        trainer.die()
        assert child.wait() == ORPHANED


def notice_death(run: Path) -> float:
    """Return the seconds from the kernel's report of a trainer's death to the end of its idle worker."""
    with mortal_trainer() as trainer, worker(run, trainer_pidfd=trainer.pidfd) as child:
        began_at = time.perf_counter()
        trainer.die()
        assert child.wait() == ORPHANED
        return time.perf_counter() - began_at


def test_death_is_noticed_soon(tmp_path: Path) -> None:
    """With ten times the slack of the exact bound."""
    assert notice_death(tmp_path / "run") < 0.5


@pytest.mark.timing
def test_death_is_noticed_within_50_ms(tmp_path: Path) -> None:
    """The kernel's report to the end of the worker's process."""
    assert sorted(notice_death(tmp_path / "run") for _ in range(9))[4] < 0.05


def test_signals_are_the_trainer_s_business(tmp_path: Path) -> None:
    """While it lives, nothing but SIGKILL ends the worker, which has a session of its own."""
    save = Save(snapshot(), step=1)
    with worker(tmp_path / "run", faults=rule("worker.block_write", "delay", seconds=0.2)) as child:
        assert os.getsid(child.pid) == child.pid
        child.start_save(save)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
            os.kill(child.pid, number)
        child.outcome(save)
        assert child.close_politely() == 0
    check_checkpoint(tmp_path / "run/step-1", save)


def test_signals_at_the_start_are_ignored_too(tmp_path: Path) -> None:
    """As soon as Python runs at all."""
    with worker(tmp_path / "run", ready=False) as child:
        ignored = 1 << (signal.SIGTERM - 1) | 1 << (signal.SIGINT - 1)
        wait_until(lambda: status_mask(child.pid, "SigIgn") & ignored == ignored, "the first line of the boot")
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(child.pid, number)
        assert child.get_ready().error is None


def status_mask(pid: int, name: str) -> int:
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith(name + ":"))


def test_a_save_that_lingers_too_long_is_left(tmp_path: Path) -> None:
    """A hung disk does not keep the process; what it leaves is an attempt, which the next job reaps."""
    run = tmp_path / "run"
    save = Save(snapshot(), step=1)
    with (
        mortal_trainer() as trainer,
        worker(
            run, trainer_pidfd=trainer.pidfd, linger=0.3, faults=rule("worker.file_sync", "delay", seconds=30)
        ) as child,
    ):
        child.start_save(save)
        child.next_where(lambda m: isinstance(m, Progress) and m.state == "staged")
        trainer.die()
        assert child.wait(timeout=10) == LINGERED
    assert names(run, "step-") == []
    assert len(names(run, ".step-1.")) == 1


def test_sigterm_cuts_the_linger_time(tmp_path: Path) -> None:
    """Once the trainer is dead, SIGTERM leaves five seconds; a linger time without limit too."""
    run = tmp_path / "run"
    save = Save(snapshot(), step=1)
    with (
        mortal_trainer() as trainer,
        worker(
            run, trainer_pidfd=trainer.pidfd, linger=None, faults=rule("worker.file_sync", "delay", seconds=60)
        ) as child,
    ):
        child.start_save(save)
        child.next_where(lambda m: isinstance(m, Progress) and m.state == "staged")
        trainer.die()
        caught = 1 << (signal.SIGTERM - 1)
        wait_until(lambda: status_mask(child.pid, "SigCgt") & caught, "the worker to listen")
        began_at = time.monotonic()
        os.kill(child.pid, signal.SIGTERM)
        assert child.wait(timeout=15) == LINGERED
        assert 4 < time.monotonic() - began_at < 10


def test_close_finishes_what_is_staged(tmp_path: Path) -> None:
    """Closed is the last frame, behind the outcome."""
    save = Save(snapshot(), step=1)
    with worker(tmp_path / "run", faults=rule("worker.block_write", "delay", seconds=0.2)) as child:
        child.start_save(save)
        child.send(Close())
        child.next(Closed)
        kinds = [type(m).__name__ for m in child.seen if type(m).__name__ != "Beat"]
        assert kinds[-3:] == ["Committed", "SlotFree", "Closed"]
        with pytest.raises(Ended):
            child.next(Closed)
        assert child.wait() == 0
    check_checkpoint(tmp_path / "run/step-1", save)


def test_close_gives_up_what_is_not_staged(tmp_path: Path) -> None:
    """Nobody would ever say that it is."""
    run = tmp_path / "run"
    save = Save(snapshot(), step=1)
    with worker(run) as child:
        child.begin(save)
        child.send(Close())
        assert child.outcome(save).kind == "cancelled"
        child.next(Closed)
        assert child.wait() == 0
    assert os.listdir(run) == [".lock"]


def test_death_while_it_closes(tmp_path: Path) -> None:
    """The linger time holds for a close too."""
    save = Save(snapshot(), step=1)
    with (
        mortal_trainer() as trainer,
        worker(
            tmp_path / "run",
            trainer_pidfd=trainer.pidfd,
            linger=0.3,
            faults=rule("worker.file_sync", "delay", seconds=30),
        ) as child,
    ):
        child.start_save(save)
        child.send(Close())
        trainer.die()
        assert child.wait(timeout=10) == LINGERED


def test_a_trainer_that_does_not_read_delays_no_save(tmp_path: Path) -> None:
    """Its socket is full of beats, and the save is committed behind them."""
    run = tmp_path / "run"
    save = Save(snapshot(), step=1)
    with worker(run, beat=0.0001) as child:
        child.begin(save)
        child.stage(save)
        wait_until(lambda: unread(child) == unread(child) > 1000, "a full socket")
        child.end(save)
        wait_until(lambda: names(run, "step-1"), "the commit")
        child.next(SlotFree)
        assert child.close_politely() == 0
    check_checkpoint(run / "step-1", save)


def unread(child: Worker) -> int:
    """Return how many bytes wait to be read, twice the pause of a beat later."""
    select.select([], [], [], 0.01)
    return int.from_bytes(fcntl.ioctl(child.socket, termios.FIONREAD, bytes(4)), sys.byteorder)


def is_readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


GRANDCHILD = """
import os, sys, threading
from pathlib import Path
from tests.worker.driver import Save, snapshot, worker

with worker(Path(sys.argv[1])) as child:
    if os.fork() == 0:  # as a DataLoader does: it holds the socket, and outlives its parent
        threading.Event().wait(600)
    save = Save(snapshot(), step=1)
    child.start_save(save)
    print(child.pid, flush=True)
    threading.Event().wait(600)
"""


def test_a_real_trainer_with_a_forked_child(tmp_path: Path) -> None:
    """SIGKILL to the trainer; its forked child lives on with every descriptor, and the save is committed."""
    run = tmp_path / "run"
    trainer = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", GRANDCHILD, run],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        start_new_session=True,
    )
    assert trainer.stdout is not None
    try:
        pid = int(trainer.stdout.readline())
        pidfd = os.pidfd_open(pid)
        try:
            trainer.kill()
            trainer.wait()
            wait_until(lambda: is_readable(pidfd), "the worker's end")
        finally:
            os.close(pidfd)
    finally:
        os.killpg(trainer.pid, signal.SIGKILL)
        trainer.stdout.close()
    assert names(run, "step-") == ["step-1"]
    assert names(run, ".step-") == []
