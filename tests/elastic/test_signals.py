"""Signals to the supervisor: events that stop the children, in scopes that are left as they were found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from aiockpt.elastic import SignalException, start_processes
from aiockpt.elastic.signals import SignalScope, signals_to_handle
from tests.elastic.supervised import LOOPS, deaf, run, scripts
from tests.support import is_alive
from tests.waiting import wait_until

pytestmark = pytest.mark.process

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


@pytest.fixture(autouse=True)
def _handlers_are_left_as_found() -> Iterator[None]:
    before = [signal.getsignal(signum) for signum in HANDLED]
    yield
    assert [signal.getsignal(signum) for signum in HANDLED] == before


@pytest.mark.parametrize("loop", LOOPS)
def test_a_signal_stops_the_children_with_it(loop: str) -> None:
    """Each gets the signal that we got, and the caller hears of it by an error (E-39, R-MP-28)."""

    async def body() -> None:
        with pytest.raises(SignalException) as raised:
            async with start_processes("worker", "sleep", {0: (1000,)}, {0: {}}) as context:
                os.kill(os.getpid(), signal.SIGINT)
                await context.wait()
        assert raised.value.sigval is signal.SIGINT
        assert raised.value.result is not None
        assert raised.value.result.failures[0].sent_signal is signal.SIGINT
        assert context.statistics().signals_sent == ("SIGINT",)

    run(body, loop)


def test_a_signal_that_nobody_waits_for_is_raised_at_the_end() -> None:
    """It is not lost where the block leaves without having waited (E-41, R-MP-28)."""

    async def body() -> None:
        with pytest.raises(SignalException):
            async with scripts("sleep 1000"):
                os.kill(os.getpid(), signal.SIGTERM)

    run(body)


def test_an_error_of_the_block_goes_before_a_signal() -> None:
    """The block's own error leaves as it is."""

    async def body() -> None:
        with pytest.raises(KeyError):
            async with scripts("sleep 1000"):
                os.kill(os.getpid(), signal.SIGTERM)
                raise KeyError

    run(body)


def test_a_second_and_a_third_signal_hasten_the_stop(tmp_path: Path) -> None:
    """They never abort it: a deaf process is killed (E-38, R-MP-29)."""

    async def body() -> None:
        ready = tmp_path / "ready"
        with pytest.raises(SignalException):
            async with scripts(deaf(ready)) as context:
                wait_until(ready.exists, "it")
                began = time.monotonic()
                for _ in range(3):
                    os.kill(os.getpid(), signal.SIGTERM)
                    await anyio.sleep(0.05)
                await context.wait()
        assert time.monotonic() - began < 10
        assert not is_alive(context.pids()[0])
        assert context.statistics().signals_sent == ("SIGTERM", "SIGKILL")

    run(body)


def test_which_signals_is_said_by_a_variable(caplog: pytest.LogCaptureFixture) -> None:
    """Names are trimmed, and one that is none is told (R-MP-27)."""
    assert signals_to_handle({}) == [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT]
    names = {"TORCHELASTIC_SIGNALS_TO_HANDLE": " SIGUSR1, SIGUSR2 ,SIGNONE,"}
    assert signals_to_handle(names) == [signal.SIGUSR1, signal.SIGUSR2]
    assert "SIGNONE" in caplog.text


def test_scopes_may_overlap_in_any_order() -> None:
    """Each hears every signal while it is open, and the first handlers are back at the end (E-39)."""

    async def body() -> None:
        async def next_of(scope: SignalScope) -> signal.Signals:
            async for signum in scope.received():
                return signum
            raise AssertionError

        one, two = (SignalScope([signal.SIGUSR1]) for _ in range(2))
        before = signal.getsignal(signal.SIGUSR1)
        one.install()
        two.install()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert await next_of(one) is await next_of(two) is signal.SIGUSR1
        one.restore()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert await next_of(two) is signal.SIGUSR1
        two.restore()
        assert signal.getsignal(signal.SIGUSR1) is before

    run(body)


def test_an_ignored_signal_stays_ignored() -> None:
    """What nohup asked for holds."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        scope = SignalScope([signal.SIGHUP])
        scope.install()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        scope.restore()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_beside_the_main_thread_there_are_no_handlers(caplog: pytest.LogCaptureFixture) -> None:
    """Processes run all the same, and the log says what that means (E-58, R-MP-27)."""

    async def body() -> None:
        async with scripts("exit 0") as context:
            result = await context.wait()
        assert result is not None
        assert not result.is_failed()

    thread = threading.Thread(target=run, args=(body,), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert "main thread" in caplog.text


PROGRAM = """
import anyio, sys, threading
from aiockpt.elastic import start_processes

async def main():
    args = {0: ("-c", "sleep 1000 & setsid sleep 1000 & echo $! $$ > " + sys.argv[1] + "; sleep 1000")}
    async with start_processes("w", "/bin/sh", args, {0: {}}) as context:
        await context.wait()

if sys.argv[2] == "thread":
    thread = threading.Thread(target=anyio.run, args=(main,), daemon=True)
    thread.start()
    thread.join()
else:
    anyio.run(main)
"""


@pytest.mark.parametrize(
    ("signum", "where"), [(signal.SIGKILL, "main"), (signal.SIGKILL, "thread"), (signal.SIGTERM, "thread")]
)
def test_nothing_outlives_its_supervisor(tmp_path: Path, signum: signal.Signals, where: str) -> None:
    """A second after the supervisor's death nothing is alive, whatever thread it ran in (E-36, E-58, R-MP-25)."""
    supervisor = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "pids"), where])
    pids = wait_until(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().split(), "them")
    supervisor.send_signal(signum)
    assert supervisor.wait(20) == -signum
    wait_until(lambda: not any(is_alive(int(pid)) for pid in pids), "the end of all", timeout=1)
