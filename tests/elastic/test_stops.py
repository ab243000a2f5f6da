"""Stopping processes: one deadline on every path, stacks before the kill, and who cannot be ended."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import anyio
import pytest

from aiockpt.elastic import start_processes
from aiockpt.elastic.failures.process_failure import Cause
from tests.elastic import functions as f
from tests.elastic.supervised import deaf, failing, functions, parent_of, pids_in, pythons, run, scripts
from tests.support import is_alive
from tests.waiting import wait_until

pytestmark = pytest.mark.process


def test_a_deaf_peer_has_the_time_given_and_no_more(tmp_path: Path) -> None:
    """A failure, a close and an exit all keep the caller's deadline (E-42, E-43, E-44, R-MP-22)."""

    async def body() -> None:
        ready = tmp_path / "ready"
        async with scripts(deaf(ready), failing(ready), stop_timeout=2) as context:
            began = time.monotonic()
            result = await context.wait()
            assert 1 < time.monotonic() - began < 5
        assert result is not None
        assert (result.failures[0].exitcode, result.failures[0].cause) == (-9, Cause.STOPPED)
        assert result.failures[0].sent_signal == signal.SIGKILL
        assert result.failures[1].cause is Cause.OWN
        again = tmp_path / "again"
        async with scripts(deaf(again)) as context:
            wait_until(again.exists, "it")
            began = time.monotonic()
            await context.close(timeout=1)
            assert time.monotonic() - began < 4

    run(body)


def test_a_close_shortens_a_stop_under_way(tmp_path: Path) -> None:
    """The shorter deadline wins (R-MP-22)."""

    async def body() -> None:
        ready = tmp_path / "ready"
        async with scripts(deaf(ready), failing(ready)) as context:
            wait_until(ready.exists, "it")
            began = time.monotonic()
            assert await context.wait(0.5) is None
            assert context.statistics().state == "stopping"
            await context.close(timeout=0)
            assert time.monotonic() - began < 5

    run(body)


def test_close_may_be_called_twice_at_once() -> None:
    """Each call returns when nothing is left (R-MP-20)."""

    async def body() -> None:
        async with scripts("sleep 1000", "sleep 1000") as context:
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(context.close)
            assert not any(map(is_alive, context.pids().values()))

    run(body)


def test_a_stopped_process_hears_its_signal() -> None:
    """One that was suspended is woken to end like the others."""

    async def body() -> None:
        async with scripts("kill -STOP $$; sleep 1000") as context:
            pid = context.pids()[0]
            wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "its stop")
            await context.close(timeout=20)
            assert context.statistics().signals_sent == ("SIGTERM",)

    run(body)


def test_stacks_of_a_deaf_function_are_kept(tmp_path: Path) -> None:
    """Before the kill all of its threads say where they are, and the failure has it (E-56, R-MP-31)."""

    async def body() -> None:
        context = start_processes(
            "worker",
            f.either,
            {0: (f.ignore_and_sleep, str(tmp_path / "ready")), 1: (f.wait_for_file_and_fail, str(tmp_path / "ready"))},
            {0: {}, 1: {}},
            stop_timeout=2,
        )
        async with context:
            result = await context.wait()
        assert result is not None
        assert "wait_where_the_stack_shows_it" in result.failures[0].stacks
        assert result.failures[1].stacks == ""

    run(body)


PYTHON = """
import faulthandler, signal, sys, time
faulthandler.enable()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
def where_it_waits():
    time.sleep(1000)
where_it_waits()
"""


def test_stacks_of_a_program_with_faulthandler_are_kept(tmp_path: Path) -> None:
    """A Python program that has it on writes them to its stderr, which the failure quotes (E-56, R-MP-31)."""
    from aiockpt.elastic import DefaultLogsSpecs, Std

    async def body() -> None:
        specs = DefaultLogsSpecs(str(tmp_path), redirects=Std.ALL)
        async with pythons(PYTHON, stop_timeout=2, logs_specs=specs) as context:
            wait_until(lambda: "ready" in Path(context.stdouts[0]).read_text(), "it")
            await context.close()
            result = await context.wait()
        assert result is not None
        assert "where_it_waits" in result.failures[0].stacks
        assert result.failures[0].exitcode == -6

    run(body)


def test_what_the_kernel_cannot_end_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for it beyond the deadline; the result has its pid, and the log what to do (E-43, R-MP-23)."""
    from aiockpt.elastic.launching.guardian_process import GuardianProcess

    send = GuardianProcess.send

    async def send_no_kill(self: GuardianProcess, message: dict, descriptors: tuple = ()) -> None:  # type: ignore[type-arg]
        if message["do"] != "kill":
            await send(self, message, descriptors)

    async def body() -> None:
        ready = tmp_path / "ready"
        async with scripts(deaf(ready)) as context:
            wait_until(ready.exists, "it")
            began = time.monotonic()
            with monkeypatch.context() as patch:
                patch.setattr(GuardianProcess, "send", send_no_kill)  # SIGKILL has no effect
                patch.setattr(GuardianProcess, "kill_all", lambda self: None)
                await context.close(timeout=0.5)
            result = await context.wait()
            assert result is not None
            assert [one.pid for one in result.unreaped] == [context.pids()[0]]
            assert result.failures[0].cause is Cause.STOPPED
        assert time.monotonic() - began < 10

    run(body)
    assert "host" in caplog.text


@pytest.mark.parametrize("is_over", [False, True], ids=["running", "ended"])
def test_a_guardian_that_is_stopped_holds_nobody(tmp_path: Path, is_over: bool) -> None:
    """What it does not do in time is done without it, and nothing is left (R-MP-22, R-MP-25)."""

    async def body() -> None:
        script = f"setsid sleep 1000 & echo $! > {tmp_path}/pid; {'true' if is_over else 'exec sleep 1000'}"
        began = time.monotonic()
        async with scripts(script, stop_timeout=1) as context:
            (below,) = wait_until(lambda: pids_in(tmp_path / "pid"), "the pid")
            guardian = parent_of(context.pids()[0])
            if is_over:
                wait_until(lambda: not is_alive(context.pids()[0]), "its end")
            os.kill(guardian, signal.SIGSTOP)
        assert time.monotonic() - began < 20
        wait_until(lambda: not any(map(is_alive, (below, guardian, context.pids()[0]))), "the end of all")

    run(body)


def test_functions_deaf_to_signals_are_killed(tmp_path: Path) -> None:
    """A function's process ends like a program's (E-37)."""

    async def body() -> None:
        async with functions(f.ignore_and_sleep, [str(tmp_path / "ready")], stop_timeout=1) as context:
            wait_until((tmp_path / "ready").exists, "it")
        assert not is_alive(context.pids()[0])

    run(body)
