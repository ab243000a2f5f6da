"""The error file that a process writes of the exception that ends it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from aiockpt.elastic.failures import error_file
from aiockpt.elastic.failures.error_data import LARGEST_NBYTES, read_error_file
from aiockpt.elastic.failures.error_file import ErrorHandler, get_error_handler, record, worker_main
from tests.elastic.recorded import run_recorded
from tests.files import small_disk

pytestmark = pytest.mark.process

RAISES = """
    from aiockpt.elastic.failures.error_file import record

    def inner():
        raise ValueError("no such batch")

    @record
    def main():
        {body}

    main()
    print("went on")
"""


def raising(body: str) -> str:
    return RAISES.replace("{body}", body)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The error file of this process."""
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    monkeypatch.delenv("AIOCKPT_ERROR_FILE", raising=False)
    monkeypatch.setattr(error_file.faulthandler, "enable", lambda **_: None)  # pytest's own is on
    return path


def fail(error: BaseException) -> None:
    raise error


def recorded(error: Exception) -> None:
    with pytest.raises(type(error)):
        record(fail)(error)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


class TestRecord:
    def test_an_exception_is_in_the_file_and_goes_on(self, tmp_path: Path) -> None:
        """The exception that ends a process is in its error file with its traceback, and ends it as before (R-ER-1)."""
        path = tmp_path / "error.json"
        before_ns = time.monotonic_ns()
        run = run_recorded(raising("inner()"), path, RANK="5", LOCAL_RANK="1", TORCHELASTIC_RESTART_COUNT="2")
        assert run.returncode == 1
        assert "ValueError: no such batch" in run.stderr
        data = read(path)
        assert data["message"]["message"] == "ValueError: no such batch"
        extra, more = data["message"]["extraInfo"], data["aiockpt"]
        assert "in inner\n" in extra["py_callstack"]
        assert "error_file.py" not in extra["py_callstack"]
        assert extra["timestamp"] == str(more["timestamp_ns"] // 10**9)
        assert before_ns < more["monotonic_ns"] < time.monotonic_ns()
        assert (more["schema"], more["rank"], more["local_rank"], more["restart_count"]) == (1, 5, 1, 2)
        assert more["hostname"] == os.uname().nodename
        assert more["exception"] == {"type": "builtins.ValueError", "message": "no such batch"}
        assert os.listdir(tmp_path) == ["error.json"]

    @pytest.mark.parametrize(
        ("body", "exitcode", "goes_on"),
        [("raise SystemExit(0)", 0, True), ("raise SystemExit(3)", 3, False), ("raise SystemExit", 0, False)],
    )
    def test_an_exit_is_no_error(self, tmp_path: Path, body: str, exitcode: int, goes_on: bool) -> None:
        """An exit with code 0 returns None, other exits pass through, and none writes a file (R-ER-2)."""
        run = run_recorded(raising(body), tmp_path / "error.json")
        assert (run.returncode, run.stdout) == (exitcode, "went on\n" if goes_on else "")
        assert not os.listdir(tmp_path)

    @pytest.mark.parametrize("body", ["import os; os._exit(4)", "import os; os.kill(os.getpid(), 9)", "return 1"])
    def test_what_is_no_exception_writes_nothing(self, tmp_path: Path, body: str) -> None:
        """A return, os._exit and a signal leave no file (R-ER-1)."""
        run = run_recorded(raising(body), tmp_path / "error.json")
        assert run.returncode in (0, 4, -signal.SIGKILL)
        assert not os.listdir(tmp_path)

    @pytest.mark.parametrize("name", [None, ""])
    def test_without_a_path_it_is_a_line_on_stderr(self, tmp_path: Path, name: str | None) -> None:
        """Without a path, or with an empty one, the record is one line of JSON on stderr (R-ER-5)."""
        run = run_recorded(raising("inner()"), None, **({} if name is None else {"TORCHELASTIC_ERROR_FILE": name}))
        line, *_ = run.stderr.splitlines()
        assert json.loads(line)["message"]["message"] == "ValueError: no such batch"
        assert run.returncode == 1

    def test_the_second_variable_names_the_path(self, tmp_path: Path) -> None:
        """AIOCKPT_ERROR_FILE names the path where torch's variable does not (R-ER-5)."""
        run_recorded(raising("inner()"), None, AIOCKPT_ERROR_FILE=str(tmp_path / "ours.json"))
        assert os.listdir(tmp_path) == ["ours.json"]

    def test_nothing_heavy_is_imported(self) -> None:
        """Recording imports neither torch nor anything outside the standard library (R-ER-14)."""
        run = run_recorded(
            """
            import sys
            before = set(sys.modules)
            import aiockpt.elastic.failures.error_file
            new = {name.partition(".")[0] for name in set(sys.modules) - before}
            print(sorted(new - sys.stdlib_module_names), "inspect" in sys.modules, "asyncio" in sys.modules)
            """,
            None,
        )
        assert run.stdout == "['aiockpt'] False False\n", run.stderr

    def test_native_crashes_print_stacks(self, tmp_path: Path) -> None:
        """A crash in native code prints the stacks of all threads, and leaves no file (R-ER-1)."""
        run = run_recorded(raising("import ctypes; ctypes.string_at(0)"), tmp_path / "error.json")
        assert run.returncode == -signal.SIGSEGV
        assert "Fatal Python error: Segmentation fault" in run.stderr
        assert not os.listdir(tmp_path)

    def test_coroutine_functions_are_recorded(self, path: Path) -> None:
        """What a coroutine function raises is recorded, and an exit with 0 returns None (R-ER-1, R-ER-2)."""

        @record
        async def main(error: BaseException) -> int:
            await asyncio.sleep(0)
            raise error

        with pytest.raises(KeyError):
            asyncio.run(main(KeyError("lost")))
        assert read(path)["message"]["message"] == "KeyError: 'lost'"

        async def exits() -> int | None:
            return await main(SystemExit(0))

        assert asyncio.run(exits()) is None

    def test_names_and_arguments_stay(self) -> None:
        """The decorated function keeps its name, arguments and result (R-ER-1)."""

        @record
        def main(a: int, *, b: int) -> int:
            return a + b

        assert (main(1, b=2), main.__name__) == (3, "main")


class TestChildFailed:
    SCRIPT = """
        from aiockpt.elastic.failures.child_failed import ChildFailedError
        from aiockpt.elastic.failures.error_file import record
        from aiockpt.elastic.failures.process_failure import ProcessFailure

        @record
        def main():
            raise {kind}("trainer", {0: {failure}(0, 77, -11, {child!r})})

        main()
    """

    def script(self, child: Path, *, of_torch: bool) -> str:
        text = self.SCRIPT.replace("{child!r}", repr(str(child)))
        for name, ours in (("kind", "ChildFailedError"), ("failure", "ProcessFailure")):
            text = text.replace(f"{{{name}}}", f"errors.{ours}" if of_torch else ours)
        if of_torch:
            text = text.replace(
                "@record", "import torch.distributed.elastic.multiprocessing.errors as errors\n\n        @record"
            )
        return text

    @pytest.mark.parametrize("of_torch", [False, True])
    def test_the_root_causes_file_becomes_ours(self, tmp_path: Path, of_torch: bool) -> None:
        """Of torch's error and of ours, the first failure's file is taken over with its exit code (R-ER-3)."""
        child = tmp_path / "child.json"
        child.write_text('{"message": {"message": "E: x", "extraInfo": {"py_callstack": "s", "timestamp": "7"}}}')
        run = run_recorded(self.script(child, of_torch=of_torch), tmp_path / "error.json")
        assert "trainer FAILED" in run.stderr
        assert read(tmp_path / "error.json") == {
            "message": {"message": "E: x", "errorCode": -11, "extraInfo": {"py_callstack": "s", "timestamp": "7"}}
        }

    def test_without_a_file_there_is_a_hint(self, tmp_path: Path) -> None:
        """Where the child left no file the hint is a formatted line, and no file is written (E-71, R-ER-3)."""
        run = run_recorded(self.script(tmp_path / "none.json", of_torch=False), tmp_path / "error.json")
        assert run.stderr.splitlines()[0].startswith("rank 0 failed without an error file; decorate")
        assert not os.listdir(tmp_path)

    @pytest.mark.parametrize(
        "content",
        [b"", b'{"message": {"mess', b"[1]", b"\xff" * 2_000_000],
        ids=["empty", "half", "foreign", "long"],
    )
    def test_a_childs_bad_file_is_told_of(self, path: Path, content: bytes) -> None:
        """A child's file that is no error file is replaced by one that says so, and shows it (E-67, R-ER-8)."""
        child = path.with_name("child.json")
        child.write_bytes(content)
        get_error_handler().dump_error_file(str(child), 9)
        data = read(path)
        assert f"{child}, was not understood" in data["message"]["message"]
        assert data["message"]["errorCode"] == 9
        assert len(data["message"]["extraInfo"]["py_callstack"]) < LARGEST_NBYTES

    def test_a_file_in_the_way_is_logged(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """A file that is already at our path is logged, whatever it is, and overwritten (R-ER-7)."""
        child = path.with_name("child.json")
        child.write_text('{"message": "the child\'s", "timestamp": 7}')
        for earlier in ('{"message": "of earlier"}', "no json of earlier"):
            path.write_text(earlier)
            caplog.clear()
            get_error_handler().dump_error_file(str(child), 3)
            assert "of earlier" in caplog.text
            assert "exit code 3 is not added" in caplog.text  # the message is a text
            assert read(path) == {"message": "the child's", "timestamp": 7}

    def test_a_deep_file_never_raises(self, path: Path) -> None:
        """A child's file of any depth is taken over or told of (E-67)."""
        child = path.with_name("child.json")
        for depth in range(200, 1200, 7):
            child.write_text('{"message": {"message": ' + "[" * depth + "]" * depth + "}}")
            get_error_handler().dump_error_file(str(child), 9)
            assert "message" in read(path)


class TestContent:
    def test_causes_notes_and_groups(self, path: Path) -> None:
        """Causes, notes and the members of groups are in the traceback and as fields (R-ER-6)."""
        low = OSError(28, "disk full")
        high = RuntimeError("step 7 failed")
        high.__cause__ = low
        high.add_note("rank 3 had the lock")
        recorded(ExceptionGroup("two", [high, KeyError("k")]))
        data = read(path)
        stack = data["message"]["extraInfo"]["py_callstack"]
        for text in ("disk full", "direct cause", "rank 3 had the lock", "KeyError: 'k'", "ExceptionGroup: two"):
            assert text in stack
        first, second = data["aiockpt"]["exception"]["exceptions"]
        assert first["notes"] == ["rank 3 had the lock"]
        assert first["cause"] == {"type": "builtins.OSError", "message": "[Errno 28] disk full"}
        assert second == {"type": "builtins.KeyError", "message": "'k'"}

    def test_circles_end(self, path: Path) -> None:
        """A chain of causes that is a circle is written once round (R-ER-6)."""
        first, second = ValueError("a"), ValueError("b")
        first.__cause__, second.__cause__ = second, first
        recorded(first)
        tree = read(path)["aiockpt"]["exception"]
        assert (tree["message"], tree["cause"]["message"]) == ("a", "b")
        assert "cause" not in tree["cause"]

    def test_it_is_never_too_long_to_be_read(self, path: Path) -> None:
        """However much an exception says, its file is below what a supervisor reads (R-ER-6, R-ER-13)."""
        wide = "\U0001f525" * 100_000

        def make(depth: int) -> Exception:
            error = ValueError(wide)
            for _ in range(6):
                error.add_note(wide)
            return error if depth == 0 else ExceptionGroup(wide, [make(depth - 1), make(depth - 1), make(depth - 1)])

        recorded(make(3))
        found = read_error_file(str(path))
        assert found is not None
        assert not found.problem
        assert LARGEST_NBYTES // 2 < path.stat().st_size <= LARGEST_NBYTES
        assert isinstance(found.message, dict)
        assert "characters left out" in found.message["message"]

    def test_what_cannot_be_shown_is_named(self, path: Path) -> None:
        """An exception whose text cannot be made is recorded all the same (R-ER-8)."""

        class Odd(Exception):
            def __str__(self) -> str:
                raise RuntimeError("no text")

        odd = Odd()
        odd.__notes__ = ["\ud800 half a pair", object()]  # type: ignore[list-item]
        recorded(odd)
        assert read(path)["message"]["message"] == "Odd: <Odd that cannot be shown>"

    def test_a_traceback_that_breaks_is_left_out(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where formatting fails, the type of the exception is still recorded (R-ER-8)."""
        monkeypatch.setattr(error_file.traceback, "format_exception", lambda *_: fail(MemoryError()))
        recorded(ValueError("x"))
        assert read(path)["message"]["message"] == "ValueError"


class TestTrouble:
    """Trouble while writing never hides the exception."""

    def test_a_path_that_cannot_be_written(self, tmp_path: Path) -> None:
        """Where a directory is missing, or in the place of the file, the record is on stderr (R-ER-8)."""
        (tmp_path / "directory").mkdir()
        for path in (tmp_path / "none" / "error.json", tmp_path / "directory"):
            run = run_recorded(raising("inner()"), path)
            assert run.returncode == 1
            assert run.stderr.rstrip().endswith("ValueError: no such batch")
            warning, line, *_ = run.stderr.splitlines()
            assert "was not written" in warning
            assert json.loads(line)["message"]["message"] == "ValueError: no such batch"
        assert os.listdir(tmp_path) == ["directory"]

    def test_a_full_disk(self, tmp_path: Path) -> None:
        """A full disk leaves no file and no part of one (R-ER-7, R-ER-8)."""
        with small_disk(tmp_path / "disk", "64k") as disk:
            (disk / "filler").write_bytes(b"x" * 65536)
            run = run_recorded(raising("inner()"), disk / "error.json")
            assert os.listdir(disk) == ["filler"]
        assert run.stderr.rstrip().endswith("ValueError: no such batch")

    @pytest.mark.parametrize("stderr", ["None", "open('/dev/full', 'w')", "object()"])
    def test_no_stderr(self, tmp_path: Path, stderr: str) -> None:
        """A stderr that is gone, full or no file at all changes nothing about the exception (R-ER-8)."""
        body = f"import sys; sys.stderr = {stderr}; inner()"
        run = run_recorded(raising(body), tmp_path / "none" / "error.json")
        assert run.returncode in (1, 120)  # 120: Python could not flush it at its end

    def test_a_handler_that_breaks(self, caplog: pytest.LogCaptureFixture) -> None:
        """An exception of the user's own handler is logged, and the first one goes on (R-ER-8, R-ER-14)."""

        class Breaks(ErrorHandler):
            def initialize(self) -> None:
                return

            def record_exception(self, e: BaseException) -> None:
                raise RuntimeError("handler")

        with pytest.raises(ValueError, match="first"):
            record(fail, Breaks())(ValueError("first"))
        assert "ValueError was not recorded" in caplog.text
        assert "RuntimeError: handler" in caplog.text

    @pytest.mark.parametrize("point", ["write", "fsync", "rename"])
    @pytest.mark.parametrize("earlier", [None, '{"message": "of earlier"}'])
    def test_killed_in_the_middle(self, tmp_path: Path, point: str, earlier: str | None) -> None:
        """Killed at any point of writing, a process leaves the file that was there before, or none (E-67, R-ER-7)."""
        path = tmp_path / "error.json"
        if earlier is not None:
            path.write_text(earlier)
        run = run_recorded(
            """
            import os
            from aiockpt.elastic.failures.error_file import record
            write = os.write

            def die(*args, **kwargs):
                if POINT == "write":
                    write(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), 9)

            def main():
                setattr(os, POINT, die)
                raise ValueError("x" * 100000)

            record(main)()
            """.replace("POINT", repr(point)),
            path,
        )
        assert run.returncode == -signal.SIGKILL
        assert (path.read_text() if path.exists() else None) == earlier


class TestHandler:
    def test_the_users_handler_is_used_once(self, path: Path) -> None:
        """The innermost handler keeps its record where one record is within another (R-ER-14)."""
        seen: list[str] = []

        class Mine(ErrorHandler):
            def initialize(self) -> None:
                seen.append("initialize")

            def record_exception(self, e: BaseException) -> None:
                seen.append(repr(e))

        with pytest.raises(ValueError, match="x"):
            record(record(fail, Mine()))(ValueError("x"))
        assert seen == ["initialize", "ValueError('x')"]
        assert not path.exists()

    def test_the_default_handler_never_raises(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Each method of the default handler is harmless by itself (R-ER-8, R-ER-14)."""
        handler = get_error_handler()
        handler.initialize()
        handler.dump_error_file("/nonexistent/\0", 0)
        assert "no such file" in read(path)["message"]["extraInfo"]["py_callstack"]
        handler.override_error_code_in_rootcause_data("child.json", {}, 7)
        assert "exit code 7 is not added to what child.json says" in caplog.text


class TestWorkerMain:
    def test_the_body_is_recorded(self, path: Path) -> None:
        """What the body of the context manager raises is recorded (E-70, R-ER-15)."""
        with pytest.raises(ValueError, match="in the body"), worker_main():
            raise ValueError("in the body")
        assert "in the body" in read(path)["message"]["message"]

    def test_as_a_decorator(self, path: Path) -> None:
        """What the decorated function raises is recorded, of coroutine functions too (E-70, R-ER-15)."""
        with pytest.raises(ValueError, match="x"):
            worker_main()(fail)(ValueError("x"))
        assert path.exists()
        path.unlink()

        @worker_main()
        async def main() -> None:
            raise KeyError("y")

        with pytest.raises(KeyError):
            asyncio.run(main())
        assert path.exists()

    def test_an_exit_leaves_the_block(self, path: Path) -> None:
        """An exit with code 0 does not go on behind the block (R-ER-2, R-ER-15)."""
        with pytest.raises(SystemExit), worker_main():
            raise SystemExit(0)
        assert not path.exists()


class TestTorch:
    """Torch's module and ours read and pass on each other's files."""

    def test_torch_reads_ours(self, path: Path) -> None:
        """Torch's ProcessFailure makes the same of our file as ours does (R-ER-6)."""
        from torch.distributed.elastic.multiprocessing import errors

        from aiockpt.elastic.failures.process_failure import ProcessFailure

        recorded(ValueError("ours"))
        theirs, ours = errors.ProcessFailure(1, 9, 1, str(path)), ProcessFailure(1, 9, 1, str(path))
        for name in ("local_rank", "pid", "exitcode", "error_file", "error_file_data", "message", "timestamp"):
            assert getattr(theirs, name) == getattr(ours, name)
        assert theirs.timestamp_isoformat() == ours.timestamp_isoformat()
        assert theirs.signal_name() == ours.signal_name() == "<N/A>"

    def test_ours_reads_torchs(self, tmp_path: Path) -> None:
        """Ours makes the same of a file by torch's record as torch's does (R-ER-6)."""
        from torch.distributed.elastic.multiprocessing import errors

        from aiockpt.elastic.failures.process_failure import ProcessFailure

        path = tmp_path / "error.json"
        script = raising("inner()").replace(
            "aiockpt.elastic.failures.error_file", "torch.distributed.elastic.multiprocessing.errors"
        )
        assert run_recorded(script, path).returncode == 1
        theirs, ours = errors.ProcessFailure(1, 9, 1, str(path)), ProcessFailure(1, 9, 1, str(path))
        for name in ("error_file", "error_file_data", "message", "timestamp"):
            assert getattr(theirs, name) == getattr(ours, name)
        assert "in inner\n" in ours.text()

    def test_torchs_record_passes_ours_on(self, tmp_path: Path) -> None:
        """Torch's record around our ChildFailedError takes over our file (R-ER-3)."""
        child = tmp_path / "child.json"
        assert run_recorded(raising("inner()"), child).returncode == 1
        script = TestChildFailed().script(child, of_torch=False)
        script = script.replace(
            "aiockpt.elastic.failures.error_file", "torch.distributed.elastic.multiprocessing.errors"
        )
        run = run_recorded(script, tmp_path / "error.json")
        assert "trainer FAILED" in run.stderr
        expected = read(child)
        expected["message"]["errorCode"] = -11
        assert read(tmp_path / "error.json") == expected

    def test_torchs_handler_serves_our_record(self, path: Path) -> None:
        """A handler of torch's works in our record (R-ER-14)."""
        from torch.distributed.elastic.multiprocessing import errors

        class Theirs(errors.ErrorHandler):
            def initialize(self) -> None:
                return

        with pytest.raises(ValueError, match="x"):
            record(fail, Theirs())(ValueError("x"))  # type: ignore[arg-type]
        assert read(path)["message"]["message"] == "ValueError: x"
