"""What processes print, from their descriptors to files, console and reports: whole groups."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from aiockpt.elastic import ChildFailedError, DefaultLogsSpecs, Std, format_report, start_processes
from aiockpt.elastic.failures.process_failure import Cause
from aiockpt.errors import ConfigError
from tests.elastic import functions as f
from tests.elastic.supervised import LOOPS, functions, pythons, result_of, run, scripts
from tests.waiting import wait_until

pytestmark = pytest.mark.process


@pytest.mark.parametrize("loop", LOOPS)
def test_tee_redirect_and_filter(tmp_path: Path, capfd: pytest.CaptureFixture[str], loop: str) -> None:
    """Files have the bytes, the console prefixed lines, one file the chosen ones (R-MP-38, R-MP-41, R-TL-3)."""

    async def body() -> None:
        specs = DefaultLogsSpecs(str(tmp_path), redirects=Std.ALL, tee={0: Std.OUT})
        script = "printf 'loss: '; echo 1; echo other; echo trouble >&2"
        context = scripts(script, script, logs_specs=specs, duplicate_stdout_filters=["loss"])
        async with context:
            await context.wait()
        for rank in (0, 1):
            assert Path(context.stdouts[rank]).read_text() == "loss: 1\nother\n"
            assert Path(context.stderrs[rank]).read_text() == "trouble\n"
        filtered = Path(context.stdouts[0]).parents[1] / "filtered_stdout.log"
        assert filtered.read_text() == "[worker0]:loss: 1\n"
        assert Path(context.stdouts[1]).match("attempt_0/1/stdout.log")

    run(body, loop)
    assert capfd.readouterr() == ("[worker0]:loss: 1\n[worker0]:other\n", "")


def test_functions_print_from_the_first_instruction(tmp_path: Path) -> None:
    """What their import, C and grandchildren print is in the file too (R-RE-1, R-RE-8)."""

    async def body() -> None:
        specs = DefaultLogsSpecs(str(tmp_path), redirects=Std.ALL)
        context = functions(f.say_in_many_ways, [], logs_specs=specs)
        assert not (await result_of(context)).is_failed()
        assert sorted(Path(context.stdouts[0]).read_text().split()) == ["C", "descriptor", "grandchild", "python"]

    run(body)


def test_prefixes_may_be_given(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In place of name and rank (R-MP-42)."""

    async def body() -> None:
        specs = DefaultLogsSpecs(str(tmp_path), tee=Std.ALL)
        await result_of(scripts("echo a", "echo b >&2", logs_specs=specs, log_line_prefixes={0: "<x>", 1: "<y>"}))

    run(body)
    assert capfd.readouterr() == ("<x>a\n", "<y>b\n")


def test_last_words_before_sigkill_are_kept(tmp_path: Path) -> None:
    """They are in the file and in the failure, teed or redirected (R-TL-11, E-61)."""

    async def body() -> None:
        specs = DefaultLogsSpecs(str(tmp_path), redirects=Std.ALL, tee={0: Std.ALL})
        script = "echo my last words; printf 'and half a line' >&2; kill -9 $$"
        result = await result_of(scripts(script, script, logs_specs=specs))
        # The second may have been stopped before it came to speak.
        own = [failure for failure in result.failures.values() if failure.cause is Cause.OWN]
        assert own
        for failure in own:
            assert failure.stacks == ""
            assert "my last words" in failure.output_tail
            assert "and half a line" in failure.output_tail

    run(body)


def test_the_report_quotes_the_output_where_there_is_no_error_file(tmp_path: Path) -> None:
    """A program that failed without a word in its error file is explained by what it printed (R-ER-9, R-ER-11)."""

    async def body() -> None:
        specs = DefaultLogsSpecs(str(tmp_path), redirects=Std.ALL)
        result = await result_of(scripts("echo cannot open the data >&2; exit 4", "sleep 1000", logs_specs=specs))
        report = format_report("worker", result.failures)
        assert "cannot open the data" in report
        assert "exitcode" in report
        error = ChildFailedError("worker", result.failures)
        assert error.get_first_failure()[0] == 0
        assert "cannot open the data" in str(error)

    run(body)


def test_a_program_may_write_an_error_file_of_torch(tmp_path: Path) -> None:
    """One that torch's decorator records is read like one of ours (R-ER-4, R-ER-6)."""
    program = (
        "from torch.distributed.elastic.multiprocessing.errors import record\n"
        "@record\ndef main(): raise RuntimeError('of torch')\nmain()"
    )

    async def body() -> None:
        context = pythons(program, logs_specs=DefaultLogsSpecs(str(tmp_path), redirects=Std.ALL))
        failure = (await result_of(context)).failures[0]
        assert failure.error_file == context.error_files[0]
        assert "RuntimeError: of torch" in str(failure.message)

    run(body)


@pytest.mark.parametrize("content", ["", "{", '{"message": {"mess', "[]", "\udcff"], ids=range(5))
def test_a_bad_error_file_harms_nobody(tmp_path: Path, content: str) -> None:
    """The failure has what was found, and the others are stopped like always (E-67, R-ER-13)."""
    path = tmp_path / "content"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))

    async def body() -> None:
        script = f'cp {path} "$TORCHELASTIC_ERROR_FILE"; exit 6'
        specs = DefaultLogsSpecs(str(tmp_path / "logs"))
        result = await result_of(scripts(script, "sleep 1000", logs_specs=specs))
        assert result.failures[0].exitcode == 6
        assert result.failures[0].error_file_problem

    run(body)


def test_without_log_files_errors_are_kept_all_the_same() -> None:
    """With ``os.devnull`` as log directory there are no files, and yet the traceback (E-51, R-MP-40)."""

    async def body() -> None:
        failure = (await result_of(functions(f.fail, ["told"], logs_specs=DefaultLogsSpecs(os.devnull)))).failures[0]
        assert "ValueError: told" in str(failure.message)
        assert failure.error_file == "<N/A>"

    run(body)


def test_without_redirects_nothing_is_left_in_the_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups that succeed leave no directory behind; an error file that was written stays (E-52)."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    async def body() -> None:
        await result_of(scripts("exit 0"))
        assert list(tmp_path.iterdir()) == []
        failure = (await result_of(functions(f.fail, ["told"]))).failures[0]
        assert json.loads(Path(failure.error_file).read_text())["message"]

    run(body)


def test_bad_logs_are_found_before_anything_starts(tmp_path: Path) -> None:
    """A file in place of the directory; filters without files (R-MP-36, R-MP-40)."""
    (tmp_path / "file").touch()

    async def body() -> None:
        with pytest.raises(ConfigError, match="not a directory"):
            DefaultLogsSpecs(str(tmp_path / "file"), redirects=Std.ALL)
        nowhere = DefaultLogsSpecs(os.devnull, tee=Std.ALL)
        context = scripts("exit 0", logs_specs=nowhere, duplicate_stdout_filters=["x"])
        with pytest.raises(ConfigError, match="filter"):
            async with context:
                pytest.fail("it was started")
        assert context.pids() == {}

    run(body)


def test_attempts_side_by_side(tmp_path: Path) -> None:
    """A second group with the same run and attempt leaves the first one's logs alone (E-49, E-50, R-MP-37)."""

    async def body() -> None:
        specs = DefaultLogsSpecs(str(tmp_path), redirects=Std.ALL)
        seen = []
        for text in ("first", "second"):
            envs = {0: {"TORCHELASTIC_RUN_ID": "a/b", "TORCHELASTIC_RESTART_COUNT": "0"}}
            context = scripts(f"echo {text}", logs_specs=specs, envs=envs)
            await result_of(context)
            seen.append(Path(context.stdouts[0]))
        assert [path.read_text() for path in seen] == ["first\n", "second\n"]
        assert seen[0].parents[2] == seen[1].parents[2]

    run(body)


def test_a_child_without_stdout_and_one_that_prints_garbage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Closed descriptors, invalid UTF-8 and lines without an end are taken as they come (R-TL-7, R-TL-10)."""

    async def body() -> None:
        specs = DefaultLogsSpecs(str(tmp_path), tee=Std.OUT)
        garbage = "import sys; sys.stdout.buffer.write(bytes(range(128, 256)) * 100_000)"
        args = {0: ("-c", "exec 1>&- 2>&-; exit 0"), 1: ("-c", f'exec "{os.sys.executable}" -c "{garbage}"')}
        context = start_processes("worker", "/bin/sh", args, {0: {}, 1: {}}, specs)
        result = await result_of(context)
        assert not result.is_failed()
        assert Path(context.stdouts[1]).read_bytes() == bytes(range(128, 256)) * 100_000

    run(body)
    assert len(capfd.readouterr().out) > 100_000


def test_a_full_disk_under_the_logs_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The processes end as they would, and the log says that output is missing (R-TL-9)."""

    async def body() -> None:
        full = FullSpecs(str(tmp_path), tee=Std.OUT)
        result = await result_of(pythons("print('line\\n' * 1000)", logs_specs=full))
        assert not result.is_failed()

    run(body)
    assert "No space left" in caplog.text


class FullSpecs(DefaultLogsSpecs):
    """Has the logs on a disk that is full."""

    def reify(self, envs):  # type: ignore[no-untyped-def]
        logs = super().reify(envs)
        logs.stdouts = dict.fromkeys(logs.stdouts, "/dev/full")
        logs.tee_stdouts = dict(logs.stdouts)
        return logs


def test_output_goes_on_while_the_loop_is_in_use(tmp_path: Path) -> None:
    """The counters tell what was read while the processes run (R-MP-48, R-TL-6)."""

    async def body() -> None:
        specs = DefaultLogsSpecs(str(tmp_path), tee=Std.OUT)
        async with scripts("echo one; exec sleep 1000", logs_specs=specs) as context:
            while not (seen := context.statistics().output) or not seen.lines_read:
                assert await context.wait(0.01) is None
            os.kill(context.pids()[0], signal.SIGKILL)
            await context.wait()
            wait_until(lambda: Path(context.stdouts[0]).read_text() == "one\n", "the line")

    run(body)
