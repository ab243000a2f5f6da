"""What goes where, whose output it is, and what stays behind: real children under an ``Output``."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest

from aiockpt.elastic.printing.output import Output
from aiockpt.errors import ConfigError, StorageError
from tests.conftest import open_descriptors, our_threads
from tests.elastic.outputs import (
    FakeConsole,
    Logs,
    Run,
    python,
    run,
    sh,
    started,
    supervise,
    teed,
    wait_dead,
    wait_for,
)

pytestmark = pytest.mark.process


def test_tee(run_async: Run, tmp_path: Path, console: FakeConsole) -> None:
    """Files get the bytes as they are, the console lines with the rank's prefix (R-MP-38, R-MP-42, R-TL-3, R-TL-8)."""
    output = Output("trainer", teed(tmp_path, 2), nprocs=2, prefixes={1: "<one> "})
    code = "echo out; echo err >&2; printf 'no newline'"
    run_async(lambda: supervise(output, {0: sh(code), 1: sh(code)}))
    for rank in (0, 1):
        assert (tmp_path / f"{rank}.out").read_bytes() == b"out\nno newline"
        assert (tmp_path / f"{rank}.err").read_bytes() == b"err\n"
    assert sorted(console.lines()) == ["<one> no newline", "<one> out", "[trainer0]:no newline", "[trainer0]:out"]
    assert sorted(console.lines("stderr")) == ["<one> err", "[trainer0]:err"]
    statistics = output.statistics()
    assert [(s.rank, s.stream, s.lines_read, s.nbytes_read) for s in statistics.streams] == [
        (0, "stdout", 1, 14),
        (1, "stdout", 1, 14),
        (0, "stderr", 1, 4),
        (1, "stderr", 1, 4),
    ]
    assert (statistics.lines_read, statistics.nbytes_read, statistics.lines_dropped) == (4, 36, 0)
    assert statistics.errors == {}


def test_a_redirected_stream_is_the_files_own_descriptor(tmp_path: Path) -> None:
    """It is opened for appending, no child inherits it by itself, and what was in the file stays (R-RE-7, R-RE-2)."""
    (tmp_path / "0.out").write_bytes(b"earlier\n")
    logs = Logs({0: str(tmp_path / "0.out")}, {0: os.devnull})
    threads = our_threads()
    output = Output("w", logs, nprocs=1)
    output.open()
    out, err = output.descriptors(0)
    assert os.readlink(f"/proc/self/fd/{out}") == str(tmp_path / "0.out")
    assert fcntl.fcntl(out, fcntl.F_GETFL) & os.O_APPEND
    assert fcntl.fcntl(out, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert os.readlink(f"/proc/self/fd/{err}") == os.devnull
    assert our_threads() == threads, "nothing is read, nothing is written"
    with started(output, {0: sh("echo later; echo nowhere >&2")}) as children:
        children[0].wait()
        assert out not in open_descriptors(), "released"
    assert (tmp_path / "0.out").read_bytes() == b"earlier\nlater\n"


def test_run_returns_where_nothing_is_teed(run_async: Run, tmp_path: Path) -> None:
    """With nothing to read there is no work, and the end comes at once (R-TL-1)."""
    output = Output("w", Logs({0: str(tmp_path / "0.out")}), nprocs=1)

    async def body() -> None:
        output.open()
        with anyio.fail_after(60):
            await output.run()
            await output.finish(0)

    run_async(body)
    assert output.statistics().streams == ()


def test_the_console_as_it_is() -> None:
    """A stream that goes nowhere else is the supervisor's own descriptor, not what ``sys.stdout`` is (R-RE-6)."""
    output = Output("w", Logs({0: ""}, {}), nprocs=1)
    output.open()
    assert output.descriptors(0) == (1, 2)
    output.close()


def test_a_supervisor_without_a_console(tmp_path: Path) -> None:
    """Where the supervisor's own descriptors are closed, a child gets /dev/null in their place."""
    code = (
        "import os, sys\n"
        "from tests.elastic.outputs import Logs\n"
        "from aiockpt.elastic.printing.output import Output\n"
        "keep = os.open(os.devnull, os.O_RDONLY)\n"
        "os.close(1)\n"
        "output = Output('w', Logs(), nprocs=1)\n"
        "output.open()\n"
        "out, err = output.descriptors(0)\n"
        "open(sys.argv[1], 'w').write(f'{os.readlink(f\"/proc/self/fd/{out}\")} {err}')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "found")], check=False, stdout=subprocess.DEVNULL)
    assert (tmp_path / "found").read_text() == "/dev/null 2"


def test_tee_without_a_file(tmp_path: Path, console: FakeConsole) -> None:
    """A stream that has no file, or /dev/null, is shown all the same."""
    output = Output("w", Logs({0: "", 1: os.devnull}, {}, {0: "", 1: os.devnull}, {}), nprocs=2)
    run(lambda: supervise(output, {0: sh("echo a"), 1: sh("echo b")}))
    assert sorted(console.lines()) == ["[w0]:a", "[w1]:b"]


def test_filters(run_async: Run, tmp_path: Path, console: FakeConsole) -> None:
    """Lines with any of the strings go to one file for all ranks that are teed (E-64, R-MP-39, R-MP-41, R-TL-5)."""
    logs = teed(tmp_path, 3)
    del logs.tee_stdouts[2]  # by the ranks filter
    output = Output("w", logs, nprocs=3, stdout_filters=["loss", "acc"], stderr_filters=["ERROR"])
    code = "echo step 1; echo loss 0.5; echo acc 1; echo ERROR >&2; echo loss >&2"
    run_async(lambda: supervise(output, {rank: sh(code) for rank in range(3)}))
    assert sorted((tmp_path / "filtered.out").read_text().splitlines()) == [
        "[w0]:acc 1",
        "[w0]:loss 0.5",
        "[w1]:acc 1",
        "[w1]:loss 0.5",
    ]
    assert sorted((tmp_path / "filtered.err").read_text().splitlines()) == ["[w0]:ERROR", "[w1]:ERROR", "[w2]:ERROR"]
    assert len(console.lines()) == 6, "without a predicate every line is shown"
    assert (tmp_path / "2.out").read_text() == "step 1\nloss 0.5\nacc 1\n"


def test_no_filters_no_files(tmp_path: Path, console: FakeConsole) -> None:
    """Files for filters are made only where there are filters."""
    run(lambda: supervise(Output("w", teed(tmp_path), nprocs=1), {0: sh("echo a")}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.err", "0.out"]


def test_filters_without_a_file() -> None:
    """Filters whose lines have nowhere to go are refused before anything starts (E-51, R-MP-40)."""
    for path in ("", os.devnull):
        output = Output("w", Logs({}, {}, {0: ""}, {}, path), nprocs=1, stdout_filters=["a"])
        with pytest.raises(ConfigError, match="filters"):
            output.open()


def test_a_child_that_prints_nothing(run_async: Run, tmp_path: Path, console: FakeConsole) -> None:
    """Its files are there and empty, and the end does not wait for anything to appear in them (R-TL-2)."""
    run_async(lambda: supervise(Output("w", teed(tmp_path), nprocs=1), {0: ["/bin/true"]}))
    assert ((tmp_path / "0.out").read_bytes(), (tmp_path / "0.err").read_bytes()) == (b"", b"")
    assert console.read() == ""


def test_output_of_c_and_of_grandchildren(tmp_path: Path, console: FakeConsole) -> None:
    """Descriptors are redirected, so C's and a child's child's output is there too (R-RE-1, R-RE-8)."""
    code = "import ctypes, os\nctypes.CDLL(None).puts(b'from C')\nos.system('echo from a grandchild')\nprint('python')"
    output = Output("w", teed(tmp_path), nprocs=1)
    run(lambda: supervise(output, {0: python(code)}))
    assert sorted(console.lines()) == ["[w0]:from C", "[w0]:from a grandchild", "[w0]:python"]


def test_half_a_million_lines_from_c_and_python(tmp_path: Path, console: FakeConsole) -> None:
    """All of them are complete, in the file and on the console (R-RE-2)."""
    code = (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
        "for at in range(1000):\n"
        "    for _ in range(250): libc.puts(b'from C')\n"
        "    libc.fflush(None)\n"
        "    os.write(1, b'from Python\\n' * 250)\n"
    )
    output = Output("w", teed(tmp_path), nprocs=1)
    run(lambda: supervise(output, {0: python(code)}))
    found = (tmp_path / "0.out").read_bytes().split(b"\n")
    assert (len(found), found.count(b"from C"), found.count(b"from Python")) == (500_001, 250_000, 250_000)
    assert len(console.lines()) == 500_000


def test_last_words_before_a_kill(run_async: Run, tmp_path: Path, console: FakeConsole) -> None:
    """What a child wrote right before SIGKILL is in file, console and tail (E-61, R-TL-4, R-TL-11)."""
    output = Output("w", teed(tmp_path), nprocs=1)
    code = (
        "import os, signal\nfor at in range(1000): os.write(1, b'line %d\\n' % at)\n"
        "os.write(2, b'last words')\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    run_async(lambda: supervise(output, {0: python(code)}))
    assert (tmp_path / "0.out").read_bytes() == b"".join(b"line %d\n" % at for at in range(1000))
    assert console.lines()[-1] == "[w0]:line 999"
    assert console.lines("stderr") == ["[w0]:last words"]
    assert output.tail(0).startswith("stderr:\nlast words\nstdout:\nline 0\n")


def test_a_child_that_closes_its_stdout(run_async: Run, tmp_path: Path, console: FakeConsole) -> None:
    """It is no error, its last line is shown at once, and the other stream goes on."""
    output = Output("w", teed(tmp_path), nprocs=1)

    async def meanwhile(children: object) -> None:
        await wait_for(lambda: console.lines() == ["[w0]:bye"], "the line that has no end")
        (tmp_path / "go").write_text("go")

    os.mkfifo(tmp_path / "go")
    command = sh(f"printf bye; exec 1>&-; read x < {tmp_path / 'go'}; echo still here >&2")
    run_async(lambda: supervise(output, {0: command}, meanwhile=meanwhile))
    assert console.lines("stderr") == ["[w0]:still here"]
    assert output.statistics().errors == {}


def test_a_grandchild_that_holds_the_pipe(run_async: Run, tmp_path: Path, console: FakeConsole) -> None:
    """What was printed until then is there, and its living on is not waited for (R-TL-11)."""
    output = Output("w", teed(tmp_path), nprocs=1)

    async def body() -> None:
        output.open()
        with started(output, {0: sh("sleep 1000 & echo $!")}) as children:
            async with anyio.create_task_group() as group:
                group.start_soon(output.run)
                await wait_dead(children)
                with anyio.fail_after(30):
                    await output.finish(1000)
        os.kill(int((tmp_path / "0.out").read_text()), signal.SIGKILL)

    run_async(body)
    assert len(console.lines()) == 1


def test_a_grandchild_that_never_stops_printing(tmp_path: Path, console: FakeConsole) -> None:
    """What it adds after the end is not waited for either."""
    output = Output("w", teed(tmp_path, stderr=False), nprocs=1)

    async def body() -> None:
        output.open()
        with started(output, {0: sh(f"yes & echo $! > {tmp_path / 'pid'}")}) as children:
            async with anyio.create_task_group() as group:
                group.start_soon(output.run)
                await wait_dead(children)
                with anyio.fail_after(60):
                    await output.finish(1000)

    run(body)  # it ended by SIGPIPE
    with contextlib.suppress(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_finish_without_run(run_async: Run, tmp_path: Path, console: FakeConsole) -> None:
    """What is in the pipes is read though nobody read before, or reading was cancelled; a second call does nothing."""
    output = Output("w", teed(tmp_path), nprocs=1)

    async def body() -> None:
        output.open()
        with started(output, {0: sh("echo a; echo b >&2")}) as children:
            await wait_dead(children)
            with anyio.CancelScope() as scope:
                scope.cancel()
                await output.run()
            await output.finish(60)
            await output.finish(60)

    run_async(body)
    assert (console.lines(), console.lines("stderr")) == (["[w0]:a"], ["[w0]:b"])


def test_nothing_is_lost_wherever_reading_is_cancelled(tmp_path: Path, console: FakeConsole) -> None:
    """After each number of turns of the loop, ``finish`` finds the rest (R-TL-4)."""
    for turns in range(12):
        path = tmp_path / str(turns)
        path.mkdir()
        output = Output("w", teed(path), nprocs=1)

        async def body(output: Output = output, turns: int = turns) -> None:
            output.open()
            with started(
                output, {0: python("import os\nfor at in range(200): os.write(1, b'%d\\n' % at)")}
            ) as children:
                async with anyio.create_task_group() as group:
                    group.start_soon(output.run)
                    for _ in range(turns):
                        await anyio.lowlevel.checkpoint()
                    group.cancel_scope.cancel()
                await wait_dead(children)
                await output.finish(60)

        run(body)
        assert (path / "0.out").read_bytes() == b"".join(b"%d\n" % at for at in range(200))


@pytest.mark.timeout(180)
def test_64_children_and_half_a_million_lines(run_async: Run, tmp_path: Path, console: FakeConsole) -> None:
    """None is lost, in files, console and filters, and all stay whole and in order (R-TL-4, R-TL-8)."""
    nprocs, count = 64, 8000
    output = Output("w", teed(tmp_path, nprocs), nprocs=nprocs, stdout_filters=["77"])
    code = "seq 1 7500; i=0; while [ $i -lt 500 ]; do i=$((i+1)); echo one by one $i; done"
    run_async(lambda: supervise(output, {rank: sh(code) for rank in range(nprocs)}))
    expected = [str(at) for at in range(1, 7501)] + [f"one by one {at}" for at in range(1, 501)]
    shown: dict[int, list[str]] = {rank: [] for rank in range(nprocs)}
    for line in console.lines():
        prefix, _, text = line.partition("]:")
        shown[int(prefix.removeprefix("[w"))].append(text)
    for rank in range(nprocs):
        assert (tmp_path / f"{rank}.out").read_text().splitlines() == expected
        assert shown[rank] == expected
    assert output.statistics().lines_read == nprocs * count
    assert output.statistics().lines_dropped == 0
    chosen = sum("77" in line for line in expected)
    assert len((tmp_path / "filtered.out").read_text().splitlines()) == nprocs * chosen


def test_threads_and_descriptors_for_many_streams(tmp_path: Path, console: FakeConsole) -> None:
    """Two threads whatever the number of streams and filters, and two descriptors for a stream (E-60, R-TL-8)."""
    threads, descriptors = our_threads(), open_descriptors()
    output = Output("w", teed(tmp_path, 64), nprocs=64, stdout_filters=["a"], stderr_filters=["b"])
    output.open()
    for rank in range(64):
        output.release(rank)
    assert len(our_threads() - threads) == 2
    assert len(open_descriptors()) - len(descriptors) == 2 * 128 + 2
    output.close()


def test_nothing_wakes_up_while_nothing_is_printed(tmp_path: Path, console: FakeConsole) -> None:
    """In half a second of silence the writers' threads do not run at all (E-60)."""
    output = Output("w", teed(tmp_path, 4), nprocs=4)

    def switches() -> dict[str, str]:
        found = {}
        for thread in threading.enumerate():
            if thread.name in ("aiockpt-console", "aiockpt-log-files"):
                status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
                found[thread.name] = status[status.index("voluntary_ctxt_switches") :]
        return found

    async def meanwhile(children: Any) -> None:
        await wait_for(lambda: len(console.lines()) == 4, "the first lines")
        before = ""
        while (now := switches()) != before:  # until they sleep
            before = now
            await anyio.sleep(0.05)
        await anyio.sleep(0.5)
        assert switches() == before
        assert len(before) == 2
        for child in children.values():
            child.kill()

    run(lambda: supervise(output, {rank: sh("echo a; exec sleep 1000") for rank in range(4)}, meanwhile=meanwhile))


def test_a_hundred_outputs_leave_nothing(tmp_path: Path, console: FakeConsole) -> None:
    """Descriptors and threads are those from before, though the children ended by themselves (E-59, R-MP-43)."""

    async def body() -> None:
        for at in range(100):
            path = tmp_path / str(at)
            path.mkdir()
            output = Output("w", teed(path), nprocs=1, stdout_filters=["a"])
            if at % 2:
                await supervise(output, {0: ["/bin/true"]})
            else:
                output.open()
                output.close()
            if at == 1:  # a loop has a thread and descriptors of its own
                body.before = open_descriptors(), threading.active_count()  # type: ignore[attr-defined]
        assert (open_descriptors(), threading.active_count()) == body.before  # type: ignore[attr-defined]

    run(body)


@pytest.mark.parametrize("kind", ["stdout", "tee", "filtered"])
def test_a_file_that_cannot_be_opened(kind: str, tmp_path: Path) -> None:
    """The error has the path, and nothing stays open (R-TL-6)."""
    (tmp_path / "directory").mkdir()
    bad = str(tmp_path / "directory")
    logs = teed(tmp_path, 2)
    if kind == "filtered":
        logs.filtered_stderr = bad
    else:
        logs.stderrs[1] = bad
    if kind == "stdout":
        logs.tee_stderrs = {}
    before = open_descriptors(), our_threads()
    output = Output("w", logs, nprocs=2, stdout_filters=["a"], stderr_filters=["a"])
    with pytest.raises(StorageError, match="directory") as caught:
        output.open()
    assert caught.value.path == bad
    assert (open_descriptors(), our_threads()) == before


def test_a_path_that_is_none(tmp_path: Path) -> None:
    """One with a NUL is an error of the configuration."""
    with pytest.raises(ConfigError, match="cannot be a log file"):
        Output("w", Logs({0: "a\0b"}), nprocs=1).open()


def test_too_few_descriptors(tmp_path: Path) -> None:
    """Where the limit is met in the middle, all that was opened is closed, and the error says which limit."""
    code = (
        "import os, resource, sys\n"
        "from pathlib import Path\n"
        "from tests.elastic.outputs import teed\n"
        "from aiockpt.elastic.printing.output import Output\n"
        "from aiockpt.errors import StorageError\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "before = os.listdir('/proc/self/fd')\n"
        "try:\n"
        "    Output('w', teed(Path(sys.argv[1]), 64), nprocs=64).open()\n"
        "except StorageError as exc:\n"
        "    assert exc.errno == 24 and 'Too many open files' in str(exc), exc\n"
        "    assert os.listdir('/proc/self/fd') == before\n"
        "    print('well')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout == "well\n", done.stderr
