"""The guardian by itself, as its supervisor sees it: real processes, frames and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from aiockpt.elastic.guardian.descendants import children, descendants
from aiockpt.elastic.guardian.wire import LONGEST_FRAME, Frames, encode
from aiockpt.elastic.launching.guardian_process import GuardianProcess
from tests.support import is_alive
from tests.waiting import wait_until

pytestmark = pytest.mark.process


class Held:
    """A guardian, and what it reported."""

    def __init__(self, guardian: GuardianProcess) -> None:
        self.guardian = guardian
        self.events: list[dict[str, Any]] = []
        self._came = anyio.Event()

    async def listen(self) -> None:
        async for event in self.guardian.events():
            self.events.append(event)
            self._came.set()
            self._came = anyio.Event()

    async def launch(self, rank: int, script: str, **changes: Any) -> dict[str, Any]:
        message = {
            "do": "launch", "rank": rank, "executable": "/bin/sh", "argv": ["sh", "-c", script],
            "env": dict(os.environ), "inherits": [], "cpus": None, "cpus_optional": False, **changes,
        }  # fmt: skip
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            await self.guardian.send(message, (null, null))
            return await self.one(lambda event: event["event"] in ("launched", "refused") and event["rank"] == rank)
        finally:
            os.close(null)

    async def one(self, matches: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        with anyio.fail_after(20):
            while not (found := [event for event in self.events if matches(event)]):
                await self._came.wait()
        return found[0]

    async def exit_of(self, rank: int) -> int:
        status: int = (await self.one(lambda event: event["event"] == "exited" and event["rank"] == rank))["status"]
        return status


@asynccontextmanager
async def held() -> AsyncIterator[Held]:
    guardian = await GuardianProcess.start(anyio.CapacityLimiter(1))
    one = Held(guardian)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one.listen)
            yield one
            with contextlib.suppress(BrokenPipeError):  # the test has had it end
                await guardian.send({"do": "end"})
            with anyio.fail_after(20):
                await guardian.wait_ended()
            tasks.cancel_scope.cancel()
    finally:
        guardian.close()


def run(body: Callable[[], Awaitable[None]]) -> None:
    anyio.run(body, backend="asyncio", backend_options={"use_uvloop": True})


def read(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def test_ends_are_reported_as_they_come() -> None:
    """Exit codes as they are, signals as negative numbers, each with its time (R-MP-13, R-MP-18)."""

    async def body() -> None:
        async with held() as one:
            before = time.monotonic_ns()
            await one.launch(0, "exit 3")
            await one.launch(1, "kill -9 $$")
            assert await one.exit_of(0) == 3
            assert await one.exit_of(1) == -9
            assert all(before < event["at_ns"] < time.monotonic_ns() for event in one.events if "at_ns" in event)

    run(body)


def test_a_program_that_cannot_be_executed_is_refused() -> None:
    """What ``exec`` says comes back, and the guardian serves on."""

    async def body() -> None:
        async with held() as one:
            refused = await one.launch(0, "", executable="/nowhere/at/all")
            assert refused["event"] == "refused"
            assert "/nowhere/at/all" in refused["text"]
            await one.launch(1, "exit 0")
            assert await one.exit_of(1) == 0

    run(body)


def test_a_child_has_its_own_session_and_default_signals() -> None:
    """It inherits neither a handler nor a blocked or ignored signal of ours (E-40)."""
    script = """if True:
        import os, signal, sys
        ignored = any(signal.getsignal(s) is signal.SIG_IGN for s in (15, 1, 3))
        sys.exit(10 + (os.getsid(0) == os.getpid()) + 2 * ignored + 4 * bool(signal.pthread_sigmask(0, ())))"""

    async def body() -> None:
        async with held() as one:
            await one.launch(0, "", executable=sys.executable, argv=["python", "-S", "-c", script])
            assert await one.exit_of(0) == 11

    run(body)


def test_processors_are_set_before_the_program_runs() -> None:
    """A binding is the child's from its first instruction, and not the guardian's (R-NU-8, R-NU-10, E-107, E-109)."""
    script = "import os, sys; sys.exit(len(os.sched_getaffinity(0)))"

    async def body() -> None:
        async with held() as one:
            python = {"executable": sys.executable, "argv": ["python", "-S", "-c", script]}
            await one.launch(0, "", cpus=[min(os.sched_getaffinity(0))], **python)
            assert await one.exit_of(0) == 1
            await one.launch(1, "", **python)
            assert await one.exit_of(1) == len(os.sched_getaffinity(0))
            refused = await one.launch(2, "", cpus=[100_000], **python)
            assert refused["event"] == "refused"
            unbound = await one.launch(3, "", cpus=[100_000], cpus_optional=True, **python)
            assert "Invalid argument" in unbound["unbound"]
            assert await one.exit_of(3) == len(os.sched_getaffinity(0))

    run(body)


TREE = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "1000"], start_new_session=True)   # left its session
subprocess.Popen(["sh", "-c", "sleep 1001 & exec sleep 1002"])
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:                                         # its parent is gone
        print(flush=True)
        time.sleep(1000)
    os._exit(0)
os.wait()
print("ready", flush=True)
time.sleep(1000)
"""


def tree_below(guardian: int, count: int) -> set[int]:
    found: set[int] = set()

    def all_there() -> bool:
        nonlocal found
        found = set(descendants(guardian))
        return len(found) >= count

    wait_until(all_there, "the tree of processes")
    return found


def test_every_descendant_is_killed() -> None:
    """Also those that changed session, and those whose parents are gone (E-34, E-35, R-MP-24)."""

    async def body() -> None:
        async with held() as one:
            await one.launch(0, "", executable=sys.executable, argv=["python", "-S", "-c", TREE])
            below = tree_below(one.guardian.pid, 5)
            await one.guardian.send({"do": "kill"})
            emptied = await one.one(lambda event: event["event"] == "emptied")
            assert emptied["spared"] == []
            assert not any(is_alive(pid) for pid in below)

    run(body)


def test_a_group_is_signalled_and_its_leader_alone() -> None:
    """A signal goes to all of a child's group, or to itself."""

    async def body() -> None:
        async with held() as one:
            await one.launch(0, "trap 'exit 7' USR1; sleep 1000 & wait")
            await one.launch(1, "sleep 1000; exit 8")
            await one.guardian.send({"do": "signal", "ranks": [0], "signum": signal.SIGUSR1, "leader_only": True})
            await one.guardian.send({"do": "signal", "ranks": [1], "signum": signal.SIGTERM, "leader_only": False})
            assert await one.exit_of(1) == -15

    run(body)


SUPERVISOR = """
import anyio, os, sys
from aiockpt.elastic.launching.guardian_process import GuardianProcess

async def main():
    guardian = await GuardianProcess.start(anyio.CapacityLimiter(1))
    message = {"do": "launch", "rank": 0, "executable": sys.executable, "argv": ["python", "-S", "-c", sys.argv[1]],
               "env": dict(os.environ), "inherits": [], "cpus": None, "cpus_optional": False}
    await guardian.send(message, (1, 1))
    async for event in guardian.events():
        print(guardian.pid, guardian.socket_path, flush=True)

anyio.run(main)
"""


@pytest.mark.parametrize("is_late", [False, True], ids=["at-once", "both-signs-in-one-look"])
def test_nothing_outlives_a_killed_supervisor(is_late: bool) -> None:
    """One second behind its SIGKILL no descendant is left, the guardian included (E-36, E-37, E-58, R-MP-25)."""
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR, TREE], stdout=subprocess.PIPE, text=True)
    assert supervisor.stdout is not None
    guardian, path = supervisor.stdout.readline().split()
    below = tree_below(int(guardian), 5) | {int(guardian)}
    if is_late:  # a guardian that was not scheduled meanwhile finds the end of the socket and the pidfd together
        os.kill(int(guardian), signal.SIGSTOP)
    supervisor.kill()
    supervisor.wait()
    os.kill(int(guardian), signal.SIGCONT)
    wait_until(lambda: not any(map(is_alive, below)), "the end of all", timeout=1)
    supervisor.stdout.close()
    wait_until(lambda: not Path(path).parent.exists(), "its directory to be gone", timeout=1)


def test_what_a_killed_guardian_leaves_is_killed() -> None:
    """The second line: its children and what they started are known by its name in their environment (R-MP-25)."""

    async def body() -> None:
        guardian = await GuardianProcess.start(anyio.CapacityLimiter(1))
        one = Held(guardian)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one.listen)
            env = {**os.environ, "AIOCKPT_GUARDIAN": str(guardian.socket_path)}
            await one.launch(0, "", executable=sys.executable, argv=["python", "-S", "-c", TREE], env=env)
            below = tree_below(guardian.pid, 5)
            os.kill(guardian.pid, signal.SIGKILL)
            with anyio.fail_after(10):
                await guardian.wait_ended()
            await anyio.to_thread.run_sync(guardian.kill_all)
            wait_until(lambda: not any(map(is_alive, below)), "the end of all")
            tasks.cancel_scope.cancel()
        guardian.close()
        assert not guardian.socket_path.parent.exists()

    run(body)


SPARED = """
import os, socket, sys, time
while not os.path.exists(sys.argv[5]):
    time.sleep(0.01)
def register():
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    connection.send(sys.argv[2].encode())
    return connection
trainers = [register() for _ in range(8)]
if os.fork():                        # its trainer has ended
    os._exit(0)
worker = register()
open(sys.argv[3], "w").write(str(os.getpid()))
while not os.path.exists(sys.argv[4]):
    time.sleep(0.01)
"""


def spared(path: Path, seconds: str, pid_file: Path, stop_file: Path, go_file: Path | str = "/") -> list[str]:
    return ["python", "-S", "-c", SPARED, str(path), seconds, str(pid_file), str(stop_file), str(go_file)]


def test_a_registered_process_is_spared_until_it_ends(tmp_path: Path) -> None:
    """It outlives the kill of all others; the guardian leaves behind it (R-MP-26)."""

    async def body() -> None:
        async with held() as one:
            argv = spared(one.guardian.socket_path, "30", tmp_path / "pid", tmp_path / "stop")
            await one.launch(0, "", executable=sys.executable, argv=argv)
            await one.launch(1, "sleep 1000")
            pid = int(wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "it"))
            await one.guardian.send({"do": "end"})
            emptied = await one.one(lambda event: event["event"] == "emptied")
            assert emptied["spared"] == [pid]
            assert is_alive(pid)
            assert is_alive(one.guardian.pid)
            (tmp_path / "stop").touch()

    run(body)


def test_a_spared_process_has_the_time_that_it_asked_for(tmp_path: Path) -> None:
    """Then it is killed like the others (R-MP-26)."""

    async def body() -> None:
        async with held() as one:
            argv = spared(one.guardian.socket_path, "0.5", tmp_path / "pid", tmp_path / "stop")
            await one.launch(0, "", executable=sys.executable, argv=argv)
            pid = int(wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "it"))
            began = time.monotonic()
            await one.guardian.send({"do": "end"})
            await one.guardian.wait_ended()
            assert 0.4 < time.monotonic() - began < 5
            assert not is_alive(pid)

    run(body)


def test_who_had_connected_before_a_kill_is_spared(tmp_path: Path) -> None:
    """Also where the guardian finds several connections, and the kill behind them, in one look (R-MP-26)."""

    async def body() -> None:
        async with held() as one:
            argv = spared(one.guardian.socket_path, "30", tmp_path / "pid", tmp_path / "stop", tmp_path / "go")
            await one.launch(0, "", executable=sys.executable, argv=argv)
            os.kill(one.guardian.pid, signal.SIGSTOP)
            (tmp_path / "go").touch()
            pid = int(wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "it"))
            await one.guardian.send({"do": "end"})
            os.kill(one.guardian.pid, signal.SIGCONT)
            emptied = await one.one(lambda event: event["event"] == "emptied")
            assert emptied["spared"] == [pid]
            (tmp_path / "stop").touch()

    run(body)


def test_a_stranger_is_not_waited_for() -> None:
    """A process that connects and is no descendant is neither killed nor waited for."""

    async def body() -> None:
        async with held() as one:
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect(str(one.guardian.socket_path))
                stranger.send(b"1000")
                await one.launch(0, "sleep 1000")
                began = time.monotonic()
                await one.guardian.send({"do": "end"})
                await one.guardian.wait_ended()
                assert time.monotonic() - began < 5

    run(body)


def test_it_needs_the_standard_library_alone() -> None:
    """It runs isolated and without site packages, small and soon."""

    async def body() -> None:
        async with held() as one:
            status = read(one.guardian.pid, "status")
            resident = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
            assert resident < 20 << 10
            assert "site-packages" not in read(one.guardian.pid, "maps")
            assert len(os.listdir(f"/proc/{one.guardian.pid}/task")) == 1

    run(body)


def test_frames_may_be_cut_anywhere() -> None:
    """Messages come out whole however the bytes arrive."""
    messages = [{"do": "kill"}, {"do": "signal", "ranks": [1, 2], "text": "\udc80ü"}]
    data = b"".join(map(encode, messages))
    for cut in range(len(data)):
        frames = Frames()
        assert [*frames.feed(data[:cut]), *frames.feed(data[cut:])] == messages


@pytest.mark.parametrize("bad", [(LONGEST_FRAME + 1).to_bytes(4, "little"), b"\x02\0\0\0[]", b"\x01\0\0\0{"])
def test_frames_that_are_none(bad: bytes) -> None:
    """A frame that is too long, or no object, is refused before anything is made of it."""
    with pytest.raises(ValueError, match=r"frame|Expecting"):
        list(Frames().feed(bad))


def fake_process(proc: Path, pid: int, parent: int, state: str, below: list[int] | None) -> None:
    task = proc / str(pid) / "task" / str(pid)
    task.mkdir(parents=True)
    (proc / str(pid) / "stat").write_text(f"{pid} (a )name) ) {state} {parent} 1 1")
    if below is not None:
        (task / "children").write_text(" ".join(map(str, below)))


@pytest.mark.parametrize("has_children_file", [True, False])
def test_descendants_by_proc(tmp_path: Path, has_children_file: bool) -> None:
    """Found with and without the kernel's lists of children; zombies are not alive, what is below them is."""
    tree = {1: (0, "S", [2, 3]), 2: (1, "Z", []), 3: (1, "D", [4]), 4: (3, "R", []), 5: (0, "S", [])}
    for pid, (parent, state, below) in tree.items():
        fake_process(tmp_path, pid, parent, state, below if has_children_file else None)
    assert children(1, proc=tmp_path) == {2, 3}
    assert descendants(1, proc=tmp_path) == {3: 1, 4: 3}
    assert descendants(99, proc=tmp_path) == {}


def test_a_message_that_is_not_taken_is_an_error() -> None:
    """A guardian that is stopped holds up nobody who speaks to it."""

    async def body() -> None:
        async with held() as one:
            os.kill(one.guardian.pid, signal.SIGSTOP)
            with pytest.raises(TimeoutError):
                while True:
                    await one.guardian.send({"do": "signal", "ranks": [], "signum": 0, "filling": "x" * 100_000})
            os.kill(one.guardian.pid, signal.SIGKILL)

    run(body)
