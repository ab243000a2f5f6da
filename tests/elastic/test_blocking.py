"""The blocking face: the same names, for programs without a loop."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from aiockpt import elastic
from aiockpt.elastic import SignalException, blocking
from aiockpt.errors import CheckpointError
from tests.elastic import functions as f
from tests.elastic.supervised import deaf
from tests.support import is_alive
from tests.waiting import wait_until

pytestmark = pytest.mark.process


def test_it_has_the_same_names_and_signatures() -> None:
    """Whoever knows one face knows the other (R-MP-49)."""
    theirs = inspect.signature(elastic.start_processes).parameters
    ours = inspect.signature(blocking.start_processes).parameters
    assert {name: p for name, p in theirs.items() if name != "signals"} == dict(ours)
    public = {name for name in vars(elastic.PContext) if not name.startswith("_")}
    assert public == {name for name in vars(blocking.PContext) if not name.startswith("_")} | {"start_method"}
    for name in ("wait", "close"):
        mine, other = (inspect.signature(getattr(kind, name)) for kind in (blocking.PContext, elastic.PContext))
        assert mine == other


def test_values_come_back() -> None:
    """Start, wait, leave."""
    with blocking.start_processes("w", f.double, {0: (1,), 1: (2,)}, {0: {}, 1: {}}) as context:
        result = context.wait()
        assert set(context.pids()) == {0, 1}
    assert result is not None
    assert result.return_values == {0: 2, 1: 4}
    assert context.statistics().state == "ended"
    assert isinstance(context, blocking.MultiprocessContext)


def test_leaving_ends_all_and_errors_leave_as_they_are() -> None:
    """As with the other face."""
    with pytest.raises(KeyError), blocking.start_processes("w", "/bin/sleep", {0: ("1000",)}, {0: {}}) as context:
        assert isinstance(context, blocking.SubprocessContext)
        assert context.wait(0.05) is None
        raise KeyError
    assert not is_alive(context.pids()[0])


def test_a_signal_in_the_main_thread_stops_the_children() -> None:
    """The loop is in another thread, the handlers are here (E-58, R-MP-28)."""
    before = signal.getsignal(signal.SIGTERM)
    context = blocking.start_processes("w", "/bin/sleep", {0: ("1000",)}, {0: {}})
    with pytest.raises(SignalException), context:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        context.wait()
    assert not is_alive(context.pids()[0])
    assert signal.getsignal(signal.SIGTERM) is before


def test_close_has_its_deadline(tmp_path: Path) -> None:
    """A deaf process is killed in the time that the call gives."""
    ready = tmp_path / "ready"
    with blocking.start_processes("w", "/bin/sh", {0: ("-c", deaf(ready))}, {0: {}}) as context:
        wait_until(ready.exists, "it")
        began = time.monotonic()
        context.close(timeout=0.5)
    assert time.monotonic() - began < 10


def test_a_failed_start_leaves_nothing(tmp_path: Path) -> None:
    """The loop's thread is gone as well; the leak check says so."""
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF is what it is not")
    program.chmod(0o755)
    with pytest.raises(CheckpointError, match="Exec format error"):
        blocking.start_processes("w", str(program), {0: ()}, {0: {}}).__enter__()


def test_nothing_outlives_it(tmp_path: Path) -> None:
    """A SIGKILL to the program ends its children within a second (R-MP-25)."""
    program = (
        "import sys; from aiockpt.elastic import blocking\n"
        "with blocking.start_processes('w', '/bin/sleep', {0: ('1000',)}, {0: {}}) as context:\n"
        "    print(context.pids()[0], flush=True); context.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        child = int(supervisor.stdout.readline())
        supervisor.kill()
    wait_until(lambda: not is_alive(child), "its end", timeout=1)
