"""The report of failed processes, and the error that carries it."""

from __future__ import annotations

import copy
import json
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing import errors as torch_errors

from aiockpt.elastic.failures.child_failed import ChildFailedError
from aiockpt.elastic.failures.process_failure import Cause, ProcessFailure
from aiockpt.elastic.failures.report import format_report
from aiockpt.errors import ConfigError
from tests.elastic.recorded import run_recorded


def failure(rank: int, exitcode: int = 1, file: Path | str = "", **more: Any) -> ProcessFailure:
    return ProcessFailure(rank, 100 + rank, exitcode, str(file), hostname="node7", **more)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An error file with a traceback."""
    path = tmp_path / "error.json"
    stack = "Traceback (most recent call last):\n  File x\nValueError: no such batch\n"
    extra = {"py_callstack": stack, "timestamp": "1700000000"}
    path.write_text(json.dumps({"message": {"message": "ValueError: no such batch", "extraInfo": extra}}))
    return path


def test_the_whole(file: Path) -> None:
    """The report has a title, the others, and the root cause with all that is known and the rule used (R-ER-11)."""
    cause = failure(1, file=file, detected_ns=5)
    stopped = failure(
        0, -15, cause=Cause.STOPPED, sent_signal=signal.SIGTERM, detected_ns=7, output_tail="peer", stacks="Thread 1\n"
    )
    report = format_report("train", {4: stopped, 5: cause})
    wide = "=" * 60, "-" * 60
    assert report == (
        f"\n{wide[0]}\ntrain FAILED\n{wide[1]}\nFailures:\n"
        "[0]:\n"
        f"  time      : {stopped.timestamp_isoformat()}\n"
        "  host      : node7\n"
        "  rank      : 4 (local_rank: 0)\n"
        "  exitcode  : -15 (pid: 100) (SIGTERM)\n"
        "  cause     : we stopped it with SIGTERM\n"
        "  error_file: <N/A>\n"
        "  traceback : Signal 15 (SIGTERM) received by PID 100\n"
        "  next: look at the root cause; this one was stopped after it\n"
        "  stacks    : \n"
        "  Thread 1\n"
        f"{wide[1]}\nRoot Cause (first observed failure):\n"
        "[1]:\n"
        f"  time      : {cause.timestamp_isoformat()}\n"
        "  host      : node7\n"
        "  rank      : 5 (local_rank: 1)\n"
        "  exitcode  : 1 (pid: 101)\n"
        "  cause     : it exited with status 1\n"
        "  chosen    : of 1 other, 1 stopped by us\n"
        f"  error_file: {file}\n"
        "  traceback : Traceback (most recent call last):\n"
        "    File x\n"
        "  ValueError: no such batch\n"
        f"{wide[0]}"
    )


def test_lines_of_torchs_report_stay(file: Path) -> None:
    """The lines of torch's report of the same failure are in ours, in that order (R-ER-11)."""
    ours = {5: failure(1, file=file)}
    theirs = torch_errors.ChildFailedError("train", {5: torch_errors.ProcessFailure(1, 101, 1, str(file))})
    lines = iter(format_report("train", ours).split("\n"))  # each is used up: "in" goes on behind the last
    for line in str(theirs).rstrip().split("\n"):
        if line.strip() and "host      :" not in line:  # torch asks the name service, which may take long
            assert line.rstrip() in lines, line


def test_the_only_one() -> None:
    """One failure has no others (R-ER-11)."""
    report = format_report("train", {0: failure(0)})
    assert "Failures:\n  <NO_OTHER_FAILURES>\n" in report
    assert "chosen    : the only failure" in report


@pytest.mark.parametrize("name", ["t", "train" * 100])
def test_borders_are_at_most_60_wide(name: str) -> None:
    """Borders are as wide as the report, and at most 60 (R-ER-11)."""
    report = format_report(name, {0: failure(0)})
    assert {len(line) for line in report.split("\n") if line and set(line) <= {"=", "-"}} == {60}


class TestOutput:
    def test_last_words_without_an_error_file(self) -> None:
        """Without an error file the last lines that it printed are shown, of the root cause more (R-ER-11)."""
        output = "".join(f"line {number}\n" for number in range(500))
        report = format_report(
            "train",
            {0: failure(0, -9, detected_ns=1, output_tail=output), 1: failure(1, 3, detected_ns=2, output_tail=output)},
        )
        others, root = report.split("Root Cause")
        assert "  output    : \n  ... 490 lines before these ...\n  line 490\n" in others
        assert "  output    : \n  ... 440 lines before these ...\n  line 440\n" in root
        assert root.rstrip("=").endswith("  line 499\n")

    def test_none_where_the_error_is_known(self, file: Path) -> None:
        """With a traceback from the error file the output is not repeated (R-ER-11)."""
        assert "printed" not in format_report("train", {0: failure(0, file=file, output_tail="printed")})

    def test_with_an_unreadable_error_file(self, file: Path) -> None:
        """With an error file that says nothing the output is shown, and how the file begins (R-ER-13)."""
        file.write_bytes(b'{"mess')
        report = format_report("train", {0: failure(0, file=file, output_tail="printed")})
        assert "  output    : \n  printed\n" in report
        assert "it begins: '{\"mess'" in report

    def test_none_of_the_stopped(self) -> None:
        """Of those that we stopped only stacks are shown, unless one is the root cause (R-MP-31, R-ER-11)."""
        found = {rank: failure(rank, -9, cause=Cause.STOPPED, output_tail="out", stacks="st") for rank in range(2)}
        others, root = format_report("train", found).split("Root Cause")
        assert ("out\n" in others, "st\n" in others, "out\n" in root, "st\n" in root) == (False, True, True, True)

    def test_it_is_bounded(self) -> None:
        """A report of 64 failures with full tails and long lines stays readable (R-ER-11)."""
        long = "x" * 65536
        many = "y\n" * 32768
        found = {rank: failure(rank, -9, output_tail=long + "\n" + many, stacks=many + long) for rank in range(64)}
        assert len(format_report("train", found)) < 300_000

    @pytest.mark.parametrize("text", ["\ud800", "\x00"])
    def test_every_stream_takes_it(self, text: str, tmp_path: Path) -> None:
        """Half a surrogate pair from a foreign file does not keep the report from being printed (R-ER-13)."""
        file = tmp_path / "error.json"
        file.write_text(json.dumps({"message": text}))
        assert format_report("train", {0: failure(0, file=file, output_tail=text)}).encode("utf-8")


class TestError:
    def test_it_is_torchs(self, file: Path) -> None:
        """The error is caught as torch's, and chooses by our rule, not by the time in the file (E-69, R-ER-11)."""
        found = {5: failure(1, -15, file, cause=Cause.STOPPED, detected_ns=3), 4: failure(0, -9, detected_ns=9)}
        with pytest.raises(torch_errors.ChildFailedError) as caught:
            raise ChildFailedError("train", found)
        assert caught.value.get_first_failure() == (4, found[4])
        assert caught.value.failures == found
        assert caught.value.name == "train"
        assert str(caught.value) == format_report("train", found) == caught.value.format_msg("#", "+")

    def test_no_failures_are_refused_in_words(self) -> None:
        """An error of no failures is refused, and says why (E-106, R-ER-11)."""
        with pytest.raises(ConfigError, match=r"no error was made of the failures of 'train'\nwhy: there are none"):
            ChildFailedError("train", {})

    def test_it_pickles_and_copies(self, file: Path) -> None:
        """The error is the same after pickling and copying, notes included, though the files are gone (R-ER-11)."""
        error = ChildFailedError("train", {1: failure(1, file=file), 2: failure(2, -9)})
        error.add_note("a note")
        file.unlink()
        for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert (type(other), str(other), other.failures) == (ChildFailedError, str(error), error.failures)
            assert other.__notes__ == ["a note"]
            assert other.get_first_failure() == (1, error.failures[1])

    def test_it_does_not_change_with_the_callers_map(self) -> None:
        """The failures are those at the time of raising (R-ER-11)."""
        found = {0: failure(0)}
        error = ChildFailedError("train", found)
        found.clear()
        assert error.get_first_failure()[0] == 0


@pytest.mark.process
def test_the_report_needs_no_torch() -> None:
    """Failures, their order and the report are there without importing torch (R-ER-11)."""
    run = run_recorded(
        """
        import sys
        from aiockpt.elastic.failures.process_failure import ProcessFailure
        from aiockpt.elastic.failures.report import format_report
        print(format_report("train", {0: ProcessFailure(0, 1, 1, "")}))
        print("torch" in sys.modules, "anyio" in sys.modules)
        """,
        None,
    )
    assert run.stdout.endswith("False False\n"), run.stderr
