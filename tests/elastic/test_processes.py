"""Groups of processes from start to end: values, failures, and that nothing is left."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from aiockpt.elastic import DefaultLogsSpecs, start_processes
from aiockpt.elastic.failures.process_failure import Cause
from aiockpt.errors import CheckpointError, ConfigError, UsageError
from tests.elastic import functions as f
from tests.elastic.supervised import LOOPS, functions, parent_of, pids_in, pythons, result_of, run, scripts
from tests.support import is_alive
from tests.waiting import wait_until

pytestmark = pytest.mark.process


@pytest.mark.parametrize("loop", LOOPS)
def test_functions_return_values(loop: str) -> None:
    """What each rank's function returned comes back, on every event loop (R-MP-1, R-MP-10, R-MP-14)."""

    async def body() -> None:
        result = await result_of(functions(f.double, [1], [2], [3]))
        assert result.return_values == {0: 2, 1: 4, 2: 6}
        assert not result.is_failed()

    run(body, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_programs_succeed_or_fail_together(loop: str) -> None:
    """A program gives None; a failure stops the others, and all are reported (E-45, R-MP-3, R-MP-11, R-MP-18)."""

    async def body() -> None:
        assert (await result_of(scripts("exit 0", "exit 0"))).return_values == {0: None, 1: None}
        result = await result_of(scripts("sleep 1000", "exit 3", "sleep 1000"))
        causes = {rank: (failure.exitcode, failure.cause) for rank, failure in result.failures.items()}
        assert causes == {0: (-15, Cause.STOPPED), 1: (3, Cause.OWN), 2: (-15, Cause.STOPPED)}
        assert result.return_values == {}

    run(body, loop)


@pytest.mark.parametrize("value", [None, b"x" * (10 << 20), {"a": [1, 2.5, "ü"]}], ids=["none", "large", "nested"])
def test_values_of_any_size(value: Any) -> None:
    """Nothing, 10 MB and nested values come back alike (R-MP-14, R-MP-15)."""

    async def body() -> None:
        assert (await result_of(functions(f.echo, [value]))).return_values == {0: value}

    run(body)


def test_tensors_go_both_ways() -> None:
    """Tensors travel by value, so nobody has to wait for the other to take them in (R-MP-14, R-MP-16)."""

    async def body() -> None:
        tensor = torch.arange(12, dtype=torch.bfloat16).view(3, 4)
        result = await result_of(functions(f.echo, [tensor]))
        assert torch.equal(result.return_values[0], tensor)

    run(body)


@pytest.mark.parametrize("code", [None, 0])
def test_exit_with_success_is_success(code: int | None) -> None:
    """``sys.exit()`` in a function is the value None (E-32, R-MP-17)."""

    async def body() -> None:
        assert (await result_of(functions(f.leave, [code]))).return_values == {0: None}

    run(body)


@pytest.mark.parametrize(
    ("function", "argument", "exitcode", "cause"),
    [
        (f.vanish, 0, 0, Cause.NO_RESULT),
        (f.vanish, 7, 7, Cause.OWN),
        (f.leave, 5, 5, Cause.OWN),
        (f.kill_itself, signal.SIGKILL, -9, Cause.OWN),
        (f.kill_itself, signal.SIGSEGV, -11, Cause.OWN),
        (f.die_in_a_value, 100 << 20, -9, Cause.OWN),
    ],
    ids=["exit-0-without-value", "exit-7", "sys-exit", "sigkill", "sigsegv", "in-a-value"],
)
def test_a_death_without_value_ends_the_group(function: Any, argument: int, exitcode: int, cause: Cause) -> None:
    """The others are stopped, and the result is there within a second of it (E-31, E-32, R-MP-15, R-MP-16)."""

    async def body() -> None:
        context = start_processes("worker", f.either, {0: (function, argument), 1: (f.sleep,)}, {0: {}, 1: {}})
        async with context:
            with anyio.fail_after(20):
                result = await context.wait()
        assert result is not None
        assert (result.failures[0].exitcode, result.failures[0].cause) == (exitcode, cause)
        assert result.failures[1].cause is Cause.STOPPED
        assert time.monotonic_ns() - result.failures[0].detected_ns < 1e9

    run(body)


def test_an_interrupt_in_a_function_is_a_failure() -> None:
    """It ends neither as success nor in silence (E-32, E-37)."""

    async def body() -> None:
        failure = (await result_of(functions(f.interrupt_itself, []))).failures[0]
        assert failure.exitcode == 1
        assert "KeyboardInterrupt" in str(failure.message)

    run(body)


def test_errors_have_their_traceback() -> None:
    """What a function raised is in its failure, with type, text and traceback (R-ER-4, R-ER-9)."""

    async def body() -> None:
        failure = (await result_of(functions(f.fail, ["no such layer"]))).failures[0]
        assert "ValueError: no such layer" in str(failure.message)
        assert "functions.py" in str(failure.error_file_data)

    run(body)


def test_an_error_while_the_function_is_imported_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what happens before the user's code runs is in the error file (E-53, R-MP-5)."""
    (tmp_path / "only_here.py").write_text(
        "import os\nif 'RANK_OF_TEST' in os.environ: raise ImportError('a part is missing')\ndef f(): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here  # type: ignore[import-not-found]

    async def body() -> None:
        context = start_processes("worker", only_here.f, {0: ()}, {0: {"RANK_OF_TEST": "1"}})
        failure = (await result_of(context)).failures[0]
        assert "a part is missing" in str(failure.message)

    run(body)


def test_a_value_that_cannot_be_pickled() -> None:
    """It is a recorded failure like any other (E-54)."""

    async def body() -> None:
        failure = (await result_of(functions(f.return_what_cannot_be, []))).failures[0]
        assert "this one stays where it is" in str(failure.message)

    run(body)


def test_a_value_that_cannot_be_read() -> None:
    """One that cannot be made again here is a failure that says so."""

    async def body() -> None:
        failure = (await result_of(functions(f.return_what_cannot_be_read, []))).failures[0]
        assert failure.cause is Cause.NO_RESULT
        assert "not in the supervisor" in failure.output_tail

    run(body)


def test_environments_are_set_before_anything_is_imported() -> None:
    """Each rank's own on top of ours, none of it in ours (R-MP-5, R-AG-50, E-105)."""

    async def body() -> None:
        before = dict(os.environ)
        context = start_processes(
            "worker", f.environment, {0: ("A", "HOME"), 1: ("A", "HOME")}, {0: {"A": "0"}, 1: {"A": "1"}}
        )
        home = os.environ.get("HOME")
        assert (await result_of(context)).return_values == {0: ["0", home], 1: ["1", home]}
        assert dict(os.environ) == before

    run(body)


def test_children_have_no_handlers_of_ours() -> None:
    """A trainer starts with the signals as the system gives them (E-40)."""

    async def body() -> None:
        result = await result_of(functions(f.is_handler_default, [signal.SIGTERM], [signal.SIGINT]))
        assert result.return_values == {0: True, 1: True}

    run(body)


def test_what_a_failed_process_left_behind_is_ended(tmp_path: Path) -> None:
    """Its children are killed though it ended by itself, also those that changed session (E-34, E-35, R-MP-24)."""

    async def body() -> None:
        result = await result_of(functions(f.start_others_and_fail, [str(tmp_path / "pids")]))
        assert result.failures[0].exitcode == 3
        assert len(pids_in(tmp_path / "pids")) == 2
        assert not any(map(is_alive, pids_in(tmp_path / "pids")))

    run(body)


def test_wait_is_precise() -> None:
    """A time-out is kept, 0 only looks, and a negative one is none (E-30, R-MP-12)."""

    async def body() -> None:
        async with scripts("sleep 1000") as context:
            began = time.monotonic()
            assert await context.wait(0.1) is None
            assert 0.09 < time.monotonic() - began < 0.3
            assert await context.wait(0) is None
            with anyio.move_on_after(0.1):
                await context.wait(-1)
            assert is_alive(context.pids()[0])
        async with scripts("exit 0") as context:
            assert await context.wait(-1) is await context.wait() is await context.wait(0)

    run(body)


@pytest.mark.timing
def test_a_death_is_known_in_20_ms(tmp_path: Path) -> None:
    """From a child's last instruction to the result of the group (E-30, R-MP-13)."""
    assert min(nanoseconds_to_know(tmp_path / str(index)) for index in range(10)) < 20e6


def test_a_death_is_known_at_once(tmp_path: Path) -> None:
    """Nobody looks from time to time: on a busy machine too it is a matter of the moment (E-30, R-MP-13)."""
    assert min(nanoseconds_to_know(tmp_path / str(index)) for index in range(5)) < 500e6


def nanoseconds_to_know(stamp: Path) -> int:
    last = "import os, sys, time; open(sys.argv[1], 'w').write(str(time.monotonic_ns())); os._exit(3)"
    known = 0

    async def body() -> None:
        nonlocal known
        async with start_processes("worker", sys.executable, {0: ("-c", last, str(stamp))}, {0: {}}) as context:
            await context.wait()
            known = time.monotonic_ns()

    run(body)
    return known - int(stamp.read_text())


def test_leaving_the_block_ends_all() -> None:
    """Processes that still run are stopped, and the error of the block leaves as it is (R-MP-1, R-MP-20)."""

    async def body() -> None:
        with pytest.raises(KeyError, match="mine") as raised:
            async with scripts("sleep 1000", "sleep 1000") as context:
                raise KeyError("mine")
        assert type(raised.value) is KeyError
        assert not any(map(is_alive, context.pids().values()))
        await context.close()
        assert context.statistics().state == "ended"

    run(body)


def test_cancellation_ends_all() -> None:
    """A cancelled scope around the block leaves no process, and no task."""

    async def body() -> None:
        with anyio.move_on_after(0.2):
            async with scripts("sleep 1000", "trap '' TERM; sleep 1000", stop_timeout=0.5) as context:
                await anyio.sleep_forever()
        assert not any(map(is_alive, context.pids().values()))

    run(body)


@pytest.mark.parametrize("turns", range(0, 60, 3))
def test_cancellation_at_any_turn(turns: int) -> None:
    """Wherever the start is cancelled nothing is left; the leak check says so."""

    async def body() -> None:
        async with anyio.create_task_group() as tasks:

            async def start() -> None:
                async with scripts("sleep 1000", stop_timeout=0):
                    await anyio.sleep_forever()

            tasks.start_soon(start)
            for _ in range(turns):
                await anyio.sleep(0.001)
            tasks.cancel_scope.cancel()

    run(body)


def test_all_or_none_is_started(tmp_path: Path) -> None:
    """A rank that cannot be started takes those with it that were (E-33, R-MP-7)."""
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF is what it is not")
    program.chmod(0o755)

    async def body() -> None:
        context = start_processes("worker", str(program), {0: (), 1: ()}, {0: {}, 1: {}})
        with pytest.raises(CheckpointError, match="Exec format error"):
            async with context:
                pytest.fail("it was started")
        assert not any(map(is_alive, context.pids().values()))

    run(body)


def test_bad_input_is_found_before_anything_is_done(tmp_path: Path) -> None:
    """Each mistake has an error that names it (R-MP-2, R-MP-4, E-33)."""
    plain = tmp_path / "plain"
    plain.write_text("#!/bin/sh\n")
    local = 0

    def inner() -> int:
        return local

    ok: dict[int, Any] = {0: ()}
    for match, call in {
        "expected the keys": lambda: start_processes("w", f.sleep, {0: (), 2: ()}, {0: {}, 2: {}}),
        "envs is not given": lambda: start_processes("w", f.sleep, {0: (), 1: ()}, {0: {}}),
        "no local ranks": lambda: start_processes("w", f.sleep, {}, {}),
        "log_line_prefixes": lambda: start_processes("w", f.sleep, ok, {0: {}}, log_line_prefixes={1: "x"}),
        "fork": lambda: start_processes("w", f.sleep, ok, {0: {}}, start_method="fork"),
        "cannot be pickled": lambda: start_processes("w", inner, ok, {0: {}}),
        "local rank 0": lambda: start_processes("w", f.echo, {0: (lambda: 1,)}, {0: {}}),
        "no directory of PATH": lambda: start_processes("w", "no-such-program", ok, {0: {}}),
        "no such file": lambda: start_processes("w", "/no/such/program", ok, {0: {}}),
        "no permission": lambda: start_processes("w", str(plain), ok, {0: {}}),
        "directory": lambda: start_processes("w", str(tmp_path), ok, {0: {}}),
        "NUL": lambda: start_processes("w", "sh", {0: ("a\0b",)}, {0: {}}),
        "handed to a process": lambda: start_processes("w", "sh", ok, {0: {"A": 1}}),  # type: ignore[dict-item]
        "proper name": lambda: start_processes("w", "sh", ok, {0: {"A=B": "1"}}),
        "no list of texts": lambda: start_processes("w", "sh", ok, {0: {}}, duplicate_stdout_filters="loss"),
        "stop_timeout": lambda: start_processes("w", "sh", ok, {0: {}}, stop_timeout=float("inf")),
    }.items():
        with pytest.raises(ConfigError, match=match):
            call()


@contextlib.contextmanager
def few_descriptors(spare: int) -> Iterator[None]:
    """Let this process open so many descriptors, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    last = max(map(int, os.listdir("/proc/self/fd")))
    with contextlib.ExitStack() as held:
        while (filling := os.open(os.devnull, os.O_RDONLY)) <= last:
            held.callback(os.close, filling)
        os.close(filling)
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1 + spare, hard))
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        yield


@pytest.mark.parametrize("spare", [*range(2, 14, 3), 20, 30])
def test_a_start_without_descriptors_is_an_error(spare: int) -> None:
    """Wherever they run out, the error says so and nothing is left; the leak check looks (R-MP-7)."""

    async def body() -> None:
        context = functions(f.sleep, *[[]] * 12)
        with few_descriptors(spare), pytest.raises(CheckpointError, match="Too many open files"):
            async with context:
                pytest.fail("it was started")

    run(body)


def test_what_logs_raise_is_heard_as_it_is() -> None:
    """A plug-in of the caller's own may raise what it likes."""

    class Broken(DefaultLogsSpecs):
        def reify(self, envs: Any) -> Any:
            raise LookupError("mine")

    async def body() -> None:
        with pytest.raises(LookupError, match="mine") as raised:
            async with scripts("exit 0", logs_specs=Broken()):
                pytest.fail("it was started")
        assert type(raised.value) is LookupError

    run(body)


def test_a_context_starts_once() -> None:
    """Neither a second start nor a wait before the first one (R-MP-6)."""

    async def body() -> None:
        context = scripts("exit 0")
        await context.close()
        with pytest.raises(UsageError, match="not started"):
            await context.wait()
        async with context:
            with pytest.raises(UsageError, match="again"):
                await context.__aenter__()
            await context.wait()

    run(body)


def test_what_can_be_asked() -> None:
    """Names, pids and statistics are there before, while and after they run (R-MP-9, R-MP-48)."""

    async def body() -> None:
        context = start_processes("worker", "sleep", {0: (1000,), 1: (1000,)}, {0: {}, 1: {}})
        assert (context.name, context.nprocs, context.entrypoint) == ("worker", 2, "sleep")
        assert context.pids() == {}
        assert context.statistics().state == "new"
        async with context:
            pids = context.pids()
            assert all(map(is_alive, pids.values()))
            assert (context.statistics().state, context.statistics().started) == ("running", 2)
            await context.close(signal.SIGINT, 5)
        assert context.pids() == pids
        statistics = context.statistics()
        assert (statistics.state, statistics.ended, statistics.signals_sent) == ("ended", 2, ("SIGINT",))
        assert context.stdouts == {0: "", 1: ""}

    run(body)


def test_processes_start_side_by_side() -> None:
    """Nobody waits for another to be there (E-55, R-MP-8)."""

    async def body() -> None:
        began = time.monotonic()
        async with pythons(*["import time; time.sleep(0.5)"] * 8) as context:
            await context.wait()
        assert time.monotonic() - began < 8 * 0.5

    run(body)


def test_nothing_is_kept_over_many_groups() -> None:
    """Descriptors and threads are as many after 100 groups as after one (R-MP-43, E-59)."""

    async def body() -> None:
        async def counts() -> tuple[int, int]:
            await result_of(scripts("exit 0", "exit 1"))
            return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

        for _ in range(10):
            descriptors, threads = await counts()
        for _ in range(90):
            last = await counts()
        assert last[0] == descriptors
        assert last[1] <= threads  # one of the loop's own may have come to its end

    run(body)


def test_a_guardian_that_is_killed_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The processes die with it, what they had started too, and the result says why (R-MP-25)."""

    async def body() -> None:
        async with scripts(f"setsid sleep 1000 & echo $! > {tmp_path}/pid; sleep 1000") as context:
            pid = context.pids()[0]
            (below,) = wait_until(lambda: pids_in(tmp_path / "pid"), "the pid")
            os.kill(parent_of(pid), signal.SIGKILL)
            result = await context.wait()
            assert result is not None
            assert result.failures[0].cause is Cause.GUARDIAN
            wait_until(lambda: not is_alive(pid) and not is_alive(below), "the end of both")

    run(body)
    assert "guardian" in caplog.text


def test_the_main_module_is_made_again(tmp_path: Path) -> None:
    """A function of the script itself runs, as with multiprocessing's spawn."""
    script = tmp_path / "script.py"
    script.write_text(
        "import anyio, sys\n"
        "from aiockpt.elastic import DefaultLogsSpecs, start_processes\n"
        "def f(x): return x + 1\n"
        "async def main():\n"
        "    async with start_processes('w', f, {0: (41,)}, {0: {}}) as context:\n"
        "        print((await context.wait()).return_values)\n"
        "if __name__ == '__main__':\n"
        "    anyio.run(main)\n"
    )

    async def body() -> None:
        logs = tmp_path / "out"
        async with scripts(f"{sys.executable} {script} > {logs}") as context:
            await context.wait()
        assert logs.read_text() == "{0: 42}\n"

    run(body)
