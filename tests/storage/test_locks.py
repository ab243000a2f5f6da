"""The run's lock between real processes: killed owners, forked children, second claims, open attempts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiockpt.errors import ConfigError
from aiockpt.storage.locks import RunLock
from tests.storage.making import opened
from tests.storage.processes import child, run
from tests.waiting import wait_until

pytestmark = pytest.mark.process

HOLD = """
    from aiockpt.storage.locks import RunLock
    fd = os.open(sys.argv[1], os.O_RDONLY)
    lock = RunLock.take(fd, sys.argv[1], timeout=0)
    lock.write_owner("run-1", "2026-01-01T00:00:00+00:00")
    say("held")
    hear()
    lock.release()
    say("free")
    hear()
"""

TRY = """
    from aiockpt.storage.locks import RunLock
    try:
        RunLock.take(os.open(sys.argv[1], os.O_RDONLY), sys.argv[1], timeout=0)
        say("free")
    except ConfigError as exc:
        say("taken")
"""

ATTEMPT = """
    from aiockpt.storage.locks import AttemptLock
    lock = AttemptLock(os.open(sys.argv[1], os.O_RDONLY))
    lock.acquire()
    say("open")
    hear()
    lock.release()
    say("closed")
    hear()
    lock.close()
    lock.close()
"""


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    fd = opened(tmp_path)
    yield fd
    os.close(fd)


def test_another_process_is_refused_until_it_is_released(directory: int, tmp_path: Path) -> None:
    """The refusal names host and pid, and what to do."""
    with child(HOLD, tmp_path) as holder:
        holder.expect("held")
        with pytest.raises(ConfigError) as caught:
            RunLock.take(directory, str(tmp_path), timeout=0.05)
        assert caught.value.argument == "run"
        assert caught.value.path == str(tmp_path)
        assert f"process {holder.pid} on host {os.uname().nodename}" in caught.value.why
        assert caught.value.next
        holder.tell()
        holder.expect("free")
        RunLock.take(directory, str(tmp_path), timeout=0).release()


def test_an_owner_without_a_record(directory: int, tmp_path: Path) -> None:
    """It is refused all the same: the lock decides, not what the file says."""
    with child(HOLD, tmp_path) as holder:
        holder.expect("held")
        (tmp_path / ".lock").write_text("{")
        with pytest.raises(ConfigError, match="left no record"):
            RunLock.take(directory, str(tmp_path), timeout=0)


def test_waiting_for_an_owner_that_ends(directory: int, tmp_path: Path) -> None:
    """Whoever waits gets the run as soon as it is free, and is told meanwhile what it waits for."""
    told = []

    with child(HOLD, tmp_path) as holder:
        holder.expect("held")

        def on_wait(what: str) -> None:
            told.append(what)
            if len(told) == 2:
                holder.tell()

        RunLock.take(directory, str(tmp_path), timeout=60, on_wait=on_wait).release()
    assert str(tmp_path) in told[0]


def test_giving_up_a_wait(directory: int, tmp_path: Path) -> None:
    """What on_wait raises ends the wait and leaves nothing behind."""

    class GivenUp(Exception):
        pass

    def on_wait(what: str) -> None:
        raise GivenUp

    with child(HOLD, tmp_path) as holder:
        holder.expect("held")
        before = os.listdir("/proc/self/fd")
        with pytest.raises(GivenUp):
            RunLock.take(directory, str(tmp_path), timeout=60, on_wait=on_wait)
        assert os.listdir("/proc/self/fd") == before
        holder.tell()
        holder.expect("free")
        RunLock.take(directory, str(tmp_path), timeout=0).release()


def test_a_killed_owner_with_a_living_forked_child(directory: int, tmp_path: Path) -> None:
    """The lock is free at once although the child has a copy of every descriptor."""
    script = """
        from aiockpt.storage.locks import RunLock
        fd = os.open(sys.argv[1], os.O_RDONLY)
        lock = RunLock.take(fd, sys.argv[1], timeout=0)
        forked = os.fork()
        if forked == 0:
            signal.pause()
        say(forked)
        hear()
    """
    with child(script, tmp_path) as owner:
        assert owner.process.stdout is not None
        forked = int(owner.process.stdout.readline())
        try:
            with pytest.raises(ConfigError):
                RunLock.take(directory, str(tmp_path), timeout=0)
            owner.process.kill()
            owner.wait()
            os.kill(forked, 0)
            RunLock.take(directory, str(tmp_path), timeout=0).release()
        finally:
            os.kill(forked, signal.SIGKILL)


def test_a_forked_child_releases_nothing(tmp_path: Path) -> None:
    """Neither release nor forget in a child touches the parent's lock; the child is refused like any other."""
    script = """
        from aiockpt.storage.locks import RunLock
        run = sys.argv[1]
        fd = os.open(run, os.O_RDONLY)
        lock = RunLock.take(fd, run, timeout=0)
        forked = os.fork()
        if forked == 0:
            lock.release()
            lock.forget_in_child()
            try:
                RunLock.take(fd, run, timeout=0)
            except ConfigError as exc:
                os._exit(0 if "process" in exc.why and "this process" not in exc.why else 1)
            os._exit(2)
        assert os.waitpid(forked, 0)[1] == 0
        say("held")
        hear()
    """
    with child(script, tmp_path) as owner:
        owner.expect("held")
        assert run(TRY, tmp_path) == "taken"


def test_the_same_process_is_refused_and_keeps_its_lock(directory: int, tmp_path: Path) -> None:
    """Record locks do not exclude their own process; the table of runs does, by whatever path it comes."""
    (tmp_path / "link").symlink_to(tmp_path)
    held = RunLock.take(directory, str(tmp_path), timeout=0)
    by_link = os.open(tmp_path / "link", os.O_RDONLY)
    try:
        with pytest.raises(ConfigError) as caught:
            RunLock.take(by_link, str(tmp_path / "link"), timeout=60)
        assert "this process" in caught.value.why
        assert run(TRY, tmp_path) == "taken"
    finally:
        os.close(by_link)
        held.release()
    held.release()
    assert run(TRY, tmp_path) == "free"


def test_a_link_in_the_place_of_the_lock_file(directory: int, tmp_path: Path) -> None:
    """It is not followed: the file that it points to keeps its content."""
    target = tmp_path / "target"
    target.write_text("somebody's")
    (tmp_path / ".lock").symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        RunLock.take(directory, str(tmp_path), timeout=0)
    assert target.read_text() == "somebody's"


def test_attempts_are_waited_for(directory: int, tmp_path: Path) -> None:
    """Byte 1 is shared among workers, and free when the last has closed its attempt, or died."""
    lock = RunLock.take(directory, str(tmp_path), timeout=0)
    assert lock.wait_attempts(0)
    told: list[str] = []
    with child(ATTEMPT, tmp_path) as first, child(ATTEMPT, tmp_path) as second:
        first.expect("open")
        second.expect("open")
        assert not lock.wait_attempts(0.05, told.append)
        assert str(tmp_path) in told[0]
        first.tell()
        first.expect("closed")
        assert not lock.wait_attempts(0)
        second.process.kill()
        assert lock.wait_attempts(60)
        first.tell()
        assert first.wait() == 0
    lock.release()


def test_an_open_attempt_does_not_keep_the_run(directory: int, tmp_path: Path) -> None:
    """The bytes are apart: a worker that finishes its save lets the next trainer in, which then waits."""
    with child(ATTEMPT, tmp_path) as worker:
        worker.expect("open")
        RunLock.take(directory, str(tmp_path), timeout=0).release()


def test_a_killed_owner_frees_the_run_within_the_wait(directory: int, tmp_path: Path) -> None:
    """A restart right after SIGKILL needs no patience of its own."""
    with child(HOLD, tmp_path) as holder:
        holder.expect("held")
        os.kill(holder.pid, signal.SIGKILL)
        RunLock.take(directory, str(tmp_path), timeout=5).release()
        wait_until(lambda: holder.process.poll() is not None, "the owner's end")
