"""The star between real processes, which are killed and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import pytest

from tests.support import PATIENCE_SECONDS
from tests.worker.star_parties import listen

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]


class Process:
    """A rank's worker; what it says comes as dictionaries."""

    def __init__(self, role: dict[str, Any]) -> None:
        fds = (role["listener"],) if "listener" in role else ()
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "tests.worker.star_parties", json.dumps(role)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=fds,
            cwd=ROOT,
            text=True,
        )
        self._said: Queue[dict[str, Any]] = Queue()
        self._reader = Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._said.put(json.loads(line))

    def save(self, n: int, step: int) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps({"n": n, "step": step}) + "\n")
        self.popen.stdin.flush()

    def expect(self, key: str) -> dict[str, Any]:
        """Return the next thing it says that has this key."""
        while True:
            said = self._said.get(timeout=PATIENCE_SECONDS)
            if key in said:
                return said

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def end(self) -> None:
        """Kill it, and collect what it leaves."""
        with contextlib.suppress(OSError):
            self.popen.kill()
        self.popen.wait(PATIENCE_SECONDS)
        self._reader.join(PATIENCE_SECONDS)
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


class Job:
    """Three ranks over one listener, which this process keeps as the trainer of rank 0 does."""

    WORLD = 3

    def __init__(self, listener: socket.socket, **options: Any) -> None:
        self._listener = listener
        self._options = options
        self.workers = [self._start(rank) for rank in range(self.WORLD)]
        for worker in self.workers:
            worker.expect("epoch")

    def _start(self, rank: int, **options: Any) -> Process:
        role: dict[str, Any] = {"rank": rank, "world": self.WORLD, **self._options, **options}
        if rank == 0:
            role |= {"listener": self._listener.fileno(), "is_first": options.get("is_first", True)}
        else:
            role["port"] = self._listener.getsockname()[1]
        return Process(role)

    def replace(self, rank: int, **options: Any) -> None:
        """Kill a worker, and start the next one of its rank."""
        self.workers[rank].end()
        self.workers[rank] = self._start(rank, **options)

    def save(self, n: int, step: int) -> list[str | None]:
        for worker in self.workers:
            worker.save(n, step)
        return [worker.expect("ended")["error"] for worker in self.workers]


@contextlib.contextmanager
def job(**options: Any) -> Iterator[Job]:
    with listen() as listener:
        os.set_inheritable(listener.fileno(), True)
        found = Job(listener, **options)
        try:
            yield found
        finally:
            for worker in found.workers:
                worker.end()


def test_a_killed_member_is_replaced() -> None:
    with job() as running:
        assert running.save(0, 10) == [None] * 3
        running.replace(2)
        running.workers[2].expect("epoch")
        assert running.save(1, 20) == [None] * 3


def test_a_killed_member_that_does_not_come_back_fails_the_save_on_all() -> None:
    with job(return_timeout=1.0) as running:
        running.workers[2].end()
        for worker in running.workers[:2]:
            worker.save(0, 10)
        assert [worker.expect("ended")["error"] for worker in running.workers[:2]] == ["rank 2 is gone"] * 2


def test_a_stopped_member_fails_the_save_and_may_come_back() -> None:
    """Once it goes on it joins again, and the next save is committed."""
    with job(stall_timeout=1.2, return_timeout=0.6) as running:
        running.workers[1].signal(signal.SIGSTOP)
        for rank in (0, 2):
            running.workers[rank].save(0, 10)
        assert {running.workers[rank].expect("ended")["error"] for rank in (0, 2)} == {"rank 1 is gone"}
        running.workers[1].signal(signal.SIGCONT)
        running.workers[1].expect("epoch")
        running.workers[1].save(0, 10)
        assert running.workers[1].expect("ended")["error"] == "rank 1 is gone"
        assert running.save(1, 20) == [None] * 3


def test_a_stopped_hub_drops_nobody_itself() -> None:
    """Its members give it up after their own time; awake again it takes them in, and has forgotten no save."""
    with job(stall_timeout=1.2, return_timeout=5.0) as running:
        running.workers[0].signal(signal.SIGSTOP)
        for worker in running.workers[1:]:
            assert "nothing came" in worker.expect("lost")["lost"]
        running.workers[0].signal(signal.SIGCONT)
        for worker in running.workers[1:]:
            worker.expect("epoch")
        assert running.save(0, 10) == [None] * 3


def test_a_killed_hub_is_followed_by_another_on_the_same_listener() -> None:
    """A save that the first had opened is ended by the second."""
    with job() as running:
        for worker in running.workers[1:]:
            worker.save(0, 10)
        for worker in running.workers[1:]:
            worker.expect("opened")
        running.replace(0, is_first=False)
        for worker in running.workers:
            worker.expect("epoch")
        running.workers[0].save(0, 10)
        assert [worker.expect("ended")["error"] for worker in running.workers] == [None] * 3
