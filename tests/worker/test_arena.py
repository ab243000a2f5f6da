"""Making an arena, and refusing to, in this process and in a real worker."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiockpt.errors import ProtocolError, StorageError
from aiockpt.protocol.messages import Reserve, Reserved
from aiockpt.worker.activity import Activity
from aiockpt.worker.arena import PIECE_NBYTES, ArenaMap, allocate
from tests.waiting import wait_until
from tests.worker.driver import Ended, Save, check_checkpoint, snapshot, state_of, worker


def make(nbytes: int, **options: object) -> int:
    return allocate(nbytes, capacity=None, activity=Activity(), **options)  # type: ignore[arg-type]


def test_every_page_is_there_and_the_size_is_sealed() -> None:
    """Nobody can cut or grow it, so that no reader of it is ended by SIGBUS."""
    fd = make(PIECE_NBYTES + 4096)
    try:
        status = os.fstat(fd)
        assert status.st_size == PIECE_NBYTES + 4096
        assert status.st_blocks * 512 >= status.st_size
        assert not os.get_inheritable(fd)
        for size in (4096, 1 << 30):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
    finally:
        os.close(fd)


def test_the_mapping_is_read_only_and_goes_when_told() -> None:
    """Its views must be released before."""
    fd = make(8192)
    os.pwrite(fd, b"bytes", 4096)
    arena = ArenaMap(fd, 8192)
    view = arena.view()
    assert view.readonly
    assert bytes(view[4096:4101]) == b"bytes"
    with pytest.raises(BufferError):
        arena.close()
    view.release()
    arena.close()


def test_a_descriptor_that_is_no_arena_is_closed() -> None:
    """Also where it is refused."""
    fd = os.memfd_create("test")
    with pytest.raises(ProtocolError, match="no arena"):
        ArenaMap(fd, 4096)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_the_oom_score_is_set_back() -> None:
    """This process is the first to be ended only while it allocates."""
    before = Path("/proc/self/oom_score_adj").read_text()
    seen = []

    def stop() -> bool:
        seen.append(int(Path("/proc/self/oom_score_adj").read_text()))
        return False

    os.close(make(4096, stop=stop))
    assert seen == [1000]
    assert Path("/proc/self/oom_score_adj").read_text() == before


def test_it_stops_when_told() -> None:
    """Between two pieces."""
    activity = Activity()
    with pytest.raises(InterruptedError):
        allocate(4 * PIECE_NBYTES, capacity=None, activity=activity, stop=lambda: activity.look()[0] == 2)
    assert activity.look() == (2, "")


def test_more_than_the_capacity_is_refused() -> None:
    """With the figures of both."""
    with pytest.raises(StorageError) as caught:
        allocate(2 << 20, capacity=1 << 20, activity=Activity())
    assert caught.value.errno == errno.ENOMEM
    assert "2.0 MiB" in caught.value.what
    assert "capacity=1048576" in caught.value.why


def test_more_than_the_machine_has_is_refused() -> None:
    """Before anything is allocated."""
    with pytest.raises(StorageError) as caught:
        make(1 << 50)
    assert caught.value.errno == errno.ENOMEM
    assert "leaves" in caught.value.why
    assert "kept free" in caught.value.why
    assert caught.value.next


# ---- by a real worker


@pytest.mark.process
def test_a_refusal_leaves_a_worker_that_serves_on(tmp_path: Path) -> None:
    """Reserved has the error and no descriptor; a smaller arena is made, and the worker maps it read-only."""
    with worker(tmp_path / "run") as child:
        error = child.reserve(1 << 50).error
        assert error is not None
        assert (error.kind, error.errno) == ("memory", errno.ENOMEM)
        assert "MemAvailable" in error.why or "/" in error.why
        error = child.reserve(2 << 20, capacity=1 << 20).error
        assert error is not None
        assert error.kind == "memory"
        child.commit(Save(snapshot(), step=1))
        with open(f"/proc/{child.pid}/maps", encoding="utf-8") as maps:
            arena = [line.split()[1] for line in maps if "memfd:aiockpt-arena" in line]
        assert arena == ["r--s"]
        assert (fcntl.fcntl(child.arena_fd, fcntl.F_GET_SEALS) & 0b110) == 0b110


@pytest.mark.process
def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """RLIMIT_FSIZE holds for shared memory too: a clear error, and nobody dies by SIGXFSZ."""
    with worker(tmp_path / "run") as child:
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        error = child.reserve(8 << 20).error
        assert error is not None
        assert (error.kind, error.errno) == ("memory", errno.EFBIG)
        assert "RLIMIT_FSIZE" in error.why
        assert "1.0 MiB" in error.why
        assert "ulimit -f" in error.next
        assert child.reserve(512 << 10).error is None


@contextlib.contextmanager
def memory_group() -> Iterator[Path]:
    """Make a memory control group of our own, of either version."""
    name = f"aiockpt-test-{uuid.uuid4().hex[:8]}"
    candidates = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            candidates.append(Path("/sys/fs/cgroup/memory") / path.lstrip("/") / name)
        elif not controllers:
            candidates.append(Path("/sys/fs/cgroup") / path.lstrip("/") / name)
    for group in candidates:
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if any((group / limit).exists() for limit in LIMITS):
                yield group
                return
        finally:
            group.rmdir()
    pytest.skip("no writable memory cgroup")


LIMITS = ("memory.limit_in_bytes", "memory.max")


def set_limit(group: Path, nbytes: int) -> Path:
    for name in LIMITS:
        if (group / name).exists():
            (group / name).write_text(str(nbytes))
            return group / name
    raise AssertionError("no limit")


@pytest.mark.process
def test_a_memory_limited_group_refuses_with_figures(tmp_path: Path) -> None:
    """The limit is named; what fits below it is made."""
    with memory_group() as group, worker(tmp_path / "run") as child:
        (group / "cgroup.procs").write_text(str(child.pid))
        limit = set_limit(group, 256 << 20)
        error = child.reserve(512 << 20).error
        assert error is not None
        assert (error.kind, error.errno) == ("memory", errno.ENOMEM)
        assert str(limit) in error.why
        assert "256.0 MiB" in error.why
        save = Save(snapshot(("model", 64 << 20)), step=1)
        child.commit(save)
        check_checkpoint(tmp_path / "run/step-1", save)
        child.kill()


@pytest.mark.process
@pytest.mark.crash
def test_a_limit_that_is_hit_while_allocating_ends_the_worker_alone(tmp_path: Path) -> None:
    """The limit shrank behind the look at it: the kernel ends the worker, not this process in the same group."""
    with memory_group() as group, worker(tmp_path / "run", odd="StoppedWhileAllocating:") as child:
        bystander = subprocess.Popen(["sleep", "60"])
        try:
            for pid in (child.pid, bystander.pid):
                (group / "cgroup.procs").write_text(str(pid))
            set_limit(group, 1 << 30)
            child.send(Reserve(nbytes=512 << 20))
            wait_until(lambda: state_of(child.pid) == "T", "the stop")
            set_limit(group, 96 << 20)
            os.kill(child.pid, signal.SIGCONT)
            with pytest.raises(Ended):
                child.next(Reserved)
            assert child.wait() == -signal.SIGKILL
            assert bystander.poll() is None
        finally:
            bystander.kill()
            bystander.wait()
