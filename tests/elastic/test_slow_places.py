"""Disks and consoles that are slow, stuck, full or broken stop neither a child nor the event loop."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from aiockpt.elastic.printing.output import Output
from tests.elastic.outputs import (
    FakeConsole,
    Logs,
    Run,
    flood,
    run,
    sh,
    supervise,
    teed,
    wait_dead,
    wait_for,
)

pytestmark = pytest.mark.process


class StuckFile:
    """A log file that takes nothing until it is let go: a pipe that nobody reads."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self._read = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._thread: threading.Thread | None = None
        self.data = bytearray()

    def let_go(self) -> None:
        os.set_blocking(self._read, True)
        self._thread = threading.Thread(target=self._drain)
        self._thread.start()

    def _drain(self) -> None:
        while data := os.read(self._read, 1 << 20):
            self.data += data

    def close(self) -> bytes:
        assert self._thread is not None
        self._thread.join(60)
        os.close(self._read)
        return bytes(self.data)


def test_a_stuck_disk_stops_no_child(run_async: Run, tmp_path: Path, console: FakeConsole) -> None:
    """A child prints 40 MB to a log that takes nothing; 16 MiB are kept, the gap is marked in file and console."""
    stuck = StuckFile(tmp_path / "0.out")
    output = Output("w", teed(tmp_path, 2), nprocs=2)

    async def meanwhile(children: Any) -> None:
        await wait_dead(children)  # the child has ended, and the loop was never held up
        await wait_for(lambda: "[w0]:done" in console.lines("stderr"), "the other stream, on a console that works")
        assert output.statistics().streams[0].file_lines_dropped > 200_000
        stuck.let_go()

    run_async(lambda: supervise(output, {0: flood(40_000_000), 1: sh("echo fine")}, meanwhile=meanwhile))
    found = stuck.close().splitlines()
    marks = [line for line in found if line.startswith(b"[aiockpt: ")]
    [stream, *_] = output.statistics().streams
    assert found.count(b"x" * 99) + stream.file_lines_dropped == 400_000
    assert len(found) == found.count(b"x" * 99) + len(marks)
    assert marks[0].decode() == f"[aiockpt: {stream.file_lines_dropped} lines dropped: the log disk is too slow]"
    assert stream.console_lines_dropped == 0
    assert any(line.startswith("[w0]:[aiockpt: ") and "0.out" in line for line in console.lines())
    assert console.lines().count("[w0]:" + "x" * 99) == 400_000
    assert "[w1]:fine" in console.lines()


def test_a_stuck_console_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is complete, the child ends, and so does ``finish``; the gap is marked (E-65, R-TL-9)."""
    stuck = StuckFile(tmp_path / "console")
    monkeypatch.setattr(sys, "stdout", open(tmp_path / "console", "w"))  # noqa: SIM115  # closed below
    output = Output("w", teed(tmp_path), nprocs=1)

    async def meanwhile(children: Any) -> None:
        await wait_dead(children)
        path = tmp_path / "0.out"
        await wait_for(lambda: path.stat().st_size == 40_000_000, "the file, which a stuck console does not hold up")
        stuck.let_go()

    run(lambda: supervise(output, {0: flood(40_000_000)}, meanwhile=meanwhile))
    sys.stdout.close()
    found = stuck.close().splitlines()
    [stream, _] = output.statistics().streams
    assert stream.file_lines_dropped == 0
    assert stream.console_lines_dropped > 200_000
    mark = f"[w0]:[aiockpt: {stream.console_lines_dropped} lines dropped: the console is too slow]"
    assert mark.encode() in found
    assert found.count(b"[w0]:" + b"x" * 99) + stream.console_lines_dropped == 400_000


def test_finish_does_not_wait_for_a_stuck_disk(tmp_path: Path, console: FakeConsole, caplog: Any) -> None:
    """It returns in its time; what was not written is counted and logged, and the console has all (E-65)."""
    stuck = StuckFile(tmp_path / "0.out")
    output = Output("w", teed(tmp_path, stderr=False), nprocs=1)
    run(lambda: supervise(output, {0: flood(1_000_000)}, timeout=0.5))
    stream = output.statistics().streams[0]
    assert stream.file_lines_dropped > 9000
    assert "bytes of output were not written to " + str(tmp_path / "0.out") in caplog.text
    assert len(console.lines()) == 10_000
    stuck.let_go()  # the thread comes out of its write, and ends
    stuck.close()


def test_finish_does_not_wait_for_a_stuck_console(tmp_path: Path) -> None:
    """It returns in its time, files are complete, and the program exits though a thread is stuck for ever (E-65)."""
    code = f"""
import anyio
from pathlib import Path
from aiockpt.elastic.printing.output import Output
from tests.elastic.outputs import supervise, teed
output = Output("w", teed(Path({str(tmp_path)!r})), nprocs=1)
anyio.run(lambda: supervise(output, {{0: {flood(5_000_000)!r}}}, timeout=1.0))
assert output.statistics().streams[0].console_lines_dropped > 1000
"""
    read, write = os.pipe()
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False, timeout=100
    )
    os.close(write)
    os.close(read)
    assert done.returncode == 0, done.stderr
    assert "bytes of output were not written to the console (stdout)" in done.stderr
    assert (tmp_path / "0.out").stat().st_size == 5_000_000


def test_finish_does_not_wait_for_a_console_that_takes_the_log_too(tmp_path: Path) -> None:
    """Where stdout, stderr and the log are one stuck terminal, it returns all the same (E-65)."""
    code = f"""
import logging, os, sys, anyio
from pathlib import Path
from aiockpt.elastic.printing.output import Output
from tests.elastic.outputs import supervise, teed
sys.stderr = sys.stdout
logging.basicConfig(stream=sys.stdout)
output = Output("w", teed(Path({str(tmp_path)!r})), nprocs=1)
anyio.run(lambda: supervise(output, {{0: {flood(5_000_000)!r}}}, timeout=1.0))
os._exit(7)
"""
    read, write = os.pipe()
    done = subprocess.run([sys.executable, "-c", code], stdout=write, check=False, timeout=100)
    os.close(write)
    os.close(read)
    assert done.returncode == 7
    assert (tmp_path / "0.out").stat().st_size == 5_000_000


def test_nothing_is_dropped_while_the_places_keep_up(run_async: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that prints 200 MB as fast as it can loses no line if what they are written to is fast."""
    monkeypatch.setattr(sys, "stdout", open(os.devnull, "w"))  # noqa: SIM115  # closed below
    output = Output("w", Logs({0: "/dev/zero"}, {}, {0: "/dev/zero"}, {}), nprocs=1)
    run_async(lambda: supervise(output, {0: flood(200_000_000)}))
    sys.stdout.close()
    assert output.statistics().lines_read == 2_000_000
    assert output.statistics().lines_dropped == 0


def test_a_full_disk(run_async: Run, tmp_path: Path, console: FakeConsole, caplog: Any) -> None:
    """It is logged once and counted, the console and the other rank go on, and the child is not stopped (R-TL-6)."""
    logs = teed(tmp_path, 2, stderr=False)
    logs.stdouts[0] = "/dev/full"
    output = Output("w", logs, nprocs=2)
    run_async(lambda: supervise(output, {0: sh("seq 1 1000"), 1: sh("seq 1 1000")}))
    statistics = output.statistics()
    assert statistics.errors["/dev/full"] >= 1
    assert (statistics.streams[0].file_lines_dropped, statistics.streams[1].file_lines_dropped) == (1000, 0)
    assert len(console.lines()) == 2000
    records = [record for record in caplog.records if "nothing more is written to /dev/full" in record.getMessage()]
    assert [record.levelno for record in records] == [logging.WARNING]
    assert "No space left on device" in records[0].getMessage()


def test_a_disk_that_is_full_for_a_while(tmp_path: Path) -> None:
    """Once there is room again what waited is written; nothing is missing."""
    code = f"""
import logging, resource, signal, sys, anyio
from pathlib import Path
from aiockpt.elastic.printing import log_writer
from aiockpt.elastic.printing.output import Output
from tests.elastic.outputs import supervise, teed, wait_for
log_writer.RETRY_SECONDS = 0.02
path = Path({str(tmp_path)!r})
output = Output("w", teed(path, stderr=False), nprocs=1)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
async def meanwhile(children):
    await wait_for(lambda: output.statistics().errors.get(str(path / "0.out"), 0) >= 2, "the disk to be full")
    assert (path / "0.out").stat().st_size == 1000
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
anyio.run(lambda: supervise(output, {{0: ["/usr/bin/seq", "1", "1000"]}}, meanwhile=meanwhile))
assert output.statistics().lines_dropped == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "0.out").read_text() == "".join(f"{at}\n" for at in range(1, 1001))
    assert done.stdout.count("\n") == 1000
    assert done.stderr.count("File too large") == 1


def test_a_broken_console(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """One whose reader is gone, or that was closed, ends nothing: files are complete, and it is told once."""
    read, write = os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w"))
    os.close(read)
    output = Output("w", teed(tmp_path, stderr=False), nprocs=1)
    run(lambda: supervise(output, {0: sh("seq 1 1000")}))
    sys.stdout.close()
    assert len((tmp_path / "0.out").read_text().splitlines()) == 1000
    assert output.statistics().streams[0].console_lines_dropped == 1000
    assert caplog.text.count("Broken pipe") == 1
    (tmp_path / "second").mkdir()
    second = Output("w", teed(tmp_path / "second", stderr=False), nprocs=1)
    run(lambda: supervise(second, {0: sh("seq 1 1000")}))
    assert second.statistics().streams[0].console_lines_dropped == 1000
    assert second.statistics().errors == {"the console (stdout)": 1}


def test_a_console_that_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody made it non-blocking; all the same nothing is lost."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w"))
    data = bytearray()

    def drain() -> None:
        while chunk := os.read(read, 5000):
            data.extend(chunk)

    reader = threading.Thread(target=drain)
    reader.start()
    output = Output("w", teed(tmp_path, stderr=False), nprocs=1)
    run(lambda: supervise(output, {0: sh("seq 1 100000")}))
    sys.stdout.close()
    reader.join(60)
    os.close(read)
    assert len(data.splitlines()) == 100_000


def test_a_gigabyte_without_a_newline() -> None:
    """Memory stays bounded, and the pieces are passed on."""
    code = """
import resource, anyio, sys
from aiockpt.elastic.printing.output import Output
from tests.elastic.outputs import Logs, sh, supervise
sys.stdout = open("/dev/null", "w")
output = Output("w", Logs({0: ""}, {}, {0: ""}, {}), nprocs=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
anyio.run(lambda: supervise(output, {0: sh("head -c 1073741824 /dev/zero")}))
assert output.statistics().nbytes_read == 1 << 30, output.statistics()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.splitlines()[-1]) < 64 << 10, "KiB"
