"""Failures of processes: what they say, and which of several is the cause."""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from aiockpt.elastic.failures import error_file
from aiockpt.elastic.failures.error_file import record
from aiockpt.elastic.failures.process_failure import Cause, ProcessFailure
from aiockpt.elastic.failures.root_cause import by_cause, is_peer_error, rule_used
from tests.elastic.recorded import PYTHON_PATH
from tests.waiting import PATIENCE_SECONDS

GIVEN_NS = 10**18
"""Made-up clocks start here, long after any real one: error files of this test are earlier."""

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:48911"
WATCHDOG = (
    "[rank1]:[E ProcessGroupNCCL.cpp:633] [Rank 1] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 600000 milliseconds before timing out.\n"
    "terminate called after throwing an instance of 'c10::DistBackendError'\n"
)


def failure(rank: int = 0, exitcode: int = 1, file: Path | str = "", **more: Any) -> ProcessFailure:
    return ProcessFailure(rank, 100 + rank, exitcode, str(file), **more)


def write(path: Path, error: BaseException, monotonic_ns: int) -> Path:
    """Write our error file of an exception met at a time."""
    data = error_file._as_data(error)
    data["aiockpt"]["monotonic_ns"] = monotonic_ns
    path.write_text(json.dumps(data))
    return path


class TestNoFile:
    def test_it_has_torchs_words(self) -> None:
        """Without a file the path, the data and the time are torch's: not available, none and now (R-ER-9)."""
        before = int(time.time())
        found = failure(exitcode=3, file="/nonexistent/error.json")
        assert found.error_file == "<N/A>"
        assert found.error_file_data["message"] == "<NONE>"
        assert before <= found.timestamp <= time.time()
        assert found.timestamp_isoformat() == time.strftime("%Y-%m-%d_%H:%M:%S", time.localtime(found.timestamp))

    @pytest.mark.parametrize("file", ["", "<N/A>", "/dev/null", "/", "\0", "x" * 5000])
    def test_what_is_no_file_is_none(self, file: str) -> None:
        """A directory, a device and an impossible path count as no file (E-67, R-ER-13)."""
        found = failure(file=file)
        assert isinstance(found.message, str)
        assert found.error_file == "<N/A>" or "File name too long" in found.message

    def test_a_fifo_is_none(self, tmp_path: Path) -> None:
        """A FIFO in the place of the file holds nobody (E-67, R-ER-13)."""
        os.mkfifo(tmp_path / "error.json")
        assert failure(file=tmp_path / "error.json").error_file == "<N/A>"

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
    def test_signals_are_named(self, number: signal.Signals) -> None:
        """The message of a signal has its number, name and pid, as torch's, and what to do (R-ER-9)."""
        found = failure(exitcode=-number)
        first, hint = found.text().split("\n")
        assert first == f"Signal {int(number)} ({number.name}) received by PID 100"
        assert hint.startswith("next: ")
        assert found.signal_name() == number.name
        assert "errorTraits" not in found.error_file_data

    @pytest.mark.parametrize("exitcode", [0, 3, -250])
    def test_no_signal_no_name(self, exitcode: int) -> None:
        """The name of a signal is not available for exit codes and unknown numbers (R-ER-9)."""
        assert failure(exitcode=exitcode).signal_name() == "<N/A>"

    @pytest.mark.parametrize(
        ("exitcode", "says"),
        [(1, "aiockpt.elastic.record"), (2, "command line"), (127, "not found"), (137, "ended by SIGKILL")],
    )
    def test_exit_codes_have_hints(self, exitcode: int, says: str) -> None:
        """The message of an exit code has a hint, and traits for those who decide on a retry (R-ER-9)."""
        found = failure(exitcode=exitcode)
        assert found.text().startswith(f"Exit code {exitcode} of PID 100\nnext: ")
        assert says in found.text()
        assert found.error_file_data["errorTraits"] == {"category": "system_terminated_error", "retryability": "False"}

    def test_data_is_not_shared(self) -> None:
        """What one failure adds to its data is not in that of the next (E-68)."""
        assert "errorTraits" in failure(exitcode=1).error_file_data
        assert failure(exitcode=-9).error_file_data == {"message": "<NONE>"}

    @pytest.mark.parametrize("cause", Cause)
    def test_causes_have_words(self, cause: Cause) -> None:
        """Each cause has a clause and a hint of its own (E-46, R-MP-18)."""
        found = failure(exitcode=-15, cause=cause, sent_signal=signal.SIGTERM if cause is Cause.STOPPED else None)
        words = {
            Cause.OWN: "it was ended by SIGTERM",
            Cause.STOPPED: "we stopped it with SIGTERM",
            Cause.OUT_OF_MEMORY: "the kernel killed it, as memory ran out",
            Cause.NO_RESULT: "it did not return a value; it was ended by SIGTERM",
            Cause.GUARDIAN: "the guardian that had started it died",
        }
        assert found.cause_in_words() == words[cause]
        assert "\nnext: " in found.text()

    def test_stopping_tells_both_ends(self) -> None:
        """Where a stopped process ended otherwise than by our signal, both are told (E-46, R-MP-18)."""
        found = failure(exitcode=7, cause=Cause.STOPPED, sent_signal=signal.SIGINT)
        assert found.cause_in_words() == "we stopped it with SIGINT; it exited with status 7"

    def test_no_result_with_code_zero(self) -> None:
        """A process that ended with code 0 and without its value is told as that (R-MP-18)."""
        found = failure(exitcode=0, cause=Cause.NO_RESULT)
        assert found.cause_in_words() == "it did not return a value; it exited with status 0"
        assert "os._exit" in found.text()

    def test_it_pickles_and_copies(self) -> None:
        """A failure is the same after pickling, though its file is gone (R-ER-9)."""
        found = failure(exitcode=-9, output_tail="last", stacks="s")
        assert pickle.loads(pickle.dumps(found)) == copy.deepcopy(found) == found


BAD = {
    "empty": b"",
    "half": b'{"message": {"message": "ValueError: x", "extraInfo": {"py_ca',
    "no-json": b"Segmentation fault",
    "no-utf8": b'{"message": "\xff\xfe"}',
    "zeros": bytes(4096),
    "list": b'["message"]',
    "no-message": b'{"error": "x"}',
    "number": b'{"message": 7}',
    "null": b"null",
    "deep": b"[" * 100_000,
    "digits": b'{"message": ' + b"9" * 10_000 + b"}",
    "long": b'{"message": "' + b"x" * (3 << 20) + b'"}',
}


class TestBadFile:
    @pytest.mark.parametrize("name", BAD)
    def test_its_beginning_is_attached(self, tmp_path: Path, name: str) -> None:
        """A file that is half-written, foreign or huge gives a failure with its beginning (E-67, R-ER-13)."""
        path = tmp_path / "error.json"
        path.write_bytes(BAD[name])
        found = failure(exitcode=-11, file=path)
        assert found.error_file == str(path)
        assert found.error_file_problem
        assert found.error_file_raw == BAD[name][:4096].decode("utf-8", "backslashreplace")
        text = found.text()
        assert text.startswith("Signal 11 (SIGSEGV) received by PID 100\nwhy: unknown; of its error file ")
        assert found.error_file_problem in text
        assert len(text) < 3000
        assert not found.has_own_error

    def test_cut_at_every_byte(self, tmp_path: Path) -> None:
        """An error file cut at any byte gives a failure that says so (E-67, R-ER-13)."""
        path = write(tmp_path / "whole.json", ValueError("x"), GIVEN_NS)
        whole, cut = path.read_bytes(), tmp_path / "cut.json"
        for length in range(len(whole)):
            cut.write_bytes(whole[:length])
            assert failure(file=cut).error_file_problem, length
        assert not failure(file=path).error_file_problem

    def test_not_readable(self, tmp_path: Path) -> None:
        """A file that the system refuses to read gives a failure that says so (E-67, R-ER-13)."""
        path = tmp_path / "error.json"
        path.symlink_to(path)
        assert "Too many levels of symbolic links (errno 40)" in failure(file=path).text()

    @pytest.mark.parametrize("timestamp", ["1e999", "-5", "NaN", '"soon"', "null", "[]", "true", "99999999999999999"])
    def test_a_strange_time_is_that_of_detection(self, tmp_path: Path, timestamp: str) -> None:
        """A time that cannot be is replaced by that of detection, or shown (E-67, R-ER-13)."""
        for text in (
            f'{{"message": "m", "timestamp": {timestamp}}}',
            f'{{"message": {{"message": "m", "extraInfo": {{"timestamp": {timestamp}}}}}}}',
            f'{{"message": {{"message": "m", "extraInfo": {timestamp}}}}}',
        ):
            path = tmp_path / "error.json"
            path.write_text(text)
            found = failure(file=path)
            assert found.text() == "m"
            assert found.timestamp == 1 or abs(found.timestamp - time.time()) < 60
            assert found.timestamp_isoformat()

    @pytest.mark.parametrize(
        ("message", "shown"),
        [
            ({"extraInfo": {"py_callstack": "stack", "timestamp": "7"}, "message": "m"}, "stack"),
            ({"message": "m", "extraInfo": {}}, "m"),
            ({"extraInfo": 7}, "<N/A>"),
            ({"message": ["m"]}, "['m']"),
            ("text", "text"),
        ],
    )
    def test_what_is_shown(self, tmp_path: Path, message: Any, shown: str) -> None:
        """Shown is a text as it is, of fields the traceback, else the message, else not available (R-ER-12)."""
        path = tmp_path / "error.json"
        path.write_text(json.dumps({"message": message}))
        assert failure(file=path).text() == shown

    @pytest.mark.parametrize("message", ["", {}])
    def test_nothing_said_is_made_up(self, tmp_path: Path, message: Any) -> None:
        """A file that says nothing is as none: the message is made of how the process ended (R-ER-9)."""
        path = tmp_path / "error.json"
        path.write_text(json.dumps({"message": message}))
        assert failure(exitcode=-9, file=path).text().startswith("Signal 9 (SIGKILL)")


class TestTimes:
    def test_the_files_own_time_is_earlier(self, tmp_path: Path) -> None:
        """An error file says when the error was met, before its process ended (R-MP-19)."""
        path = write(tmp_path / "a.json", ValueError("x"), GIVEN_NS)
        assert failure(file=path, detected_ns=GIVEN_NS + 5).failed_ns == GIVEN_NS

    @pytest.mark.parametrize("monotonic_ns", [2 * GIVEN_NS, -1, 0])
    def test_an_impossible_time_is_not_used(self, tmp_path: Path, monotonic_ns: int) -> None:
        """A file's time that is after its detection, or none, is not used (E-67, R-MP-19)."""
        path = write(tmp_path / "a.json", ValueError("x"), monotonic_ns)
        assert failure(file=path, detected_ns=GIVEN_NS).failed_ns == GIVEN_NS

    def test_torchs_whole_seconds_never_run_ahead(self, tmp_path: Path) -> None:
        """A file of torch's counts as of the end of its second, or of detection if that is earlier (E-69, R-MP-19)."""
        path = tmp_path / "a.json"
        now, now_ns = int(time.time()), time.monotonic_ns()
        for ago, earliest, latest in ((0, 0, 0), (20, 19, 20)):
            path.write_text(json.dumps({"message": "m", "timestamp": now - ago}))
            before = (now_ns - failure(file=path, detected_ns=now_ns).failed_ns) / 1e9
            assert earliest <= before <= latest

    def test_the_time_of_detection_is_shown(self) -> None:
        """Without a file the time shown is that of detection, not of reading (R-ER-9)."""
        found = failure(detected_ns=time.monotonic_ns() - 50 * 10**9)
        assert 49 <= time.time() - found.timestamp <= 52


def order(*failures: ProcessFailure) -> tuple[list[int], str]:
    """Return the ranks in order of cause, the same however they are listed, and the rule."""
    found = {tuple(each.local_rank for each in by_cause(listed)) for listed in permutations(failures)}
    assert len(found) == 1
    ranked = by_cause(failures)
    return [each.local_rank for each in ranked], rule_used(ranked)


class TestOrder:
    def test_one(self) -> None:
        """The only failure is the cause (R-ER-10)."""
        assert order(failure(3)) == ([3], "the only failure")

    def test_the_earliest(self) -> None:
        """Of failures alike the earliest by the monotonic clock is the cause (R-ER-10, R-MP-19)."""
        found = order(*(failure(rank, detected_ns=GIVEN_NS - rank * 1_500_000) for rank in range(3)))
        assert found == ([2, 1, 0], "the earliest of 3 alike by the monotonic clock, 1.500 ms before the next")

    def test_the_order_decides_a_tie(self) -> None:
        """At the same time the order in which the ends were noticed decides (R-ER-10, R-MP-19)."""
        found = order(*(failure(rank, detected_ns=GIVEN_NS, order=9 - rank) for rank in range(3)))
        assert found[0] == [2, 1, 0]
        assert found[1].endswith("noticed first of those at the same time")

    def test_stopped_by_us_is_no_cause(self) -> None:
        """Those that we stopped come after all others, whenever they ended (E-46, R-ER-10, R-MP-18)."""
        stopped = [failure(rank, -15, cause=Cause.STOPPED, detected_ns=rank + 1) for rank in range(2)]
        found = order(*stopped, failure(2, -9, detected_ns=GIVEN_NS))
        assert found == ([2, 0, 1], "of 2 others, 2 stopped by us")

    def test_all_failures_are_kept(self) -> None:
        """Of several that failed each is in the order, none is lost (E-45)."""
        assert sorted(order(*(failure(rank, rank + 1) for rank in range(5)))[0]) == [0, 1, 2, 3, 4]

    def test_failed_before_we_stopped_it(self, tmp_path: Path) -> None:
        """One that recorded its error and was stopped at its slow end is the cause all the same (R-ER-10)."""
        path = write(tmp_path / "a.json", ValueError("the cause"), GIVEN_NS)
        slow = failure(
            0, -15, path, cause=Cause.STOPPED, sent_signal=15, sent_ns=GIVEN_NS + 20, detected_ns=GIVEN_NS + 30
        )
        peer = failure(
            1, 1, detected_ns=GIVEN_NS + 10, output_tail=f"Traceback (most recent call last):\n  x\nE: {GLOO}"
        )
        assert order(slow, peer) == ([0, 1], "of 1 other, 1 met the end of a peer")
        assert slow.cause_in_words() == "we stopped it with SIGTERM; it had failed before that"

    def test_recorded_because_we_stopped_it(self, tmp_path: Path) -> None:
        """An error that was recorded after our signal is a consequence of that (E-46, R-ER-10)."""
        path = write(tmp_path / "a.json", RuntimeError("told to stop"), GIVEN_NS + 25)
        stopped = failure(
            0, 1, path, cause=Cause.STOPPED, sent_signal=15, sent_ns=GIVEN_NS + 20, detected_ns=GIVEN_NS + 30
        )
        assert order(stopped, failure(1, 1, detected_ns=GIVEN_NS + 40))[0] == [1, 0]

    def test_the_guardians_end_is_before_stopping(self) -> None:
        """One's own failure comes before those of a dead guardian, and these before the stopped (R-ER-10)."""
        guardian = failure(0, -9, cause=Cause.GUARDIAN, detected_ns=1)
        stopped = failure(1, -15, cause=Cause.STOPPED, detected_ns=2)
        assert order(guardian, stopped, failure(2, detected_ns=3)) == (
            [2, 0, 1],
            "of 2 others, 1 died with the guardian, 1 stopped by us",
        )

    def test_a_death_before_the_errors_it_caused(self, tmp_path: Path) -> None:
        """A peer's error in the same second, or dated earlier, does not beat the killed rank (E-69, R-ER-10)."""
        ours = write(tmp_path / "a.json", RuntimeError(GLOO), GIVEN_NS)
        torchs = tmp_path / "b.json"
        torchs.write_text(json.dumps({"message": f"RuntimeError: {GLOO}", "timestamp": int(time.time())}))
        found = order(
            failure(0, 1, ours, detected_ns=GIVEN_NS + 9),
            failure(1, 1, torchs, detected_ns=GIVEN_NS + 9),
            failure(2, -9, detected_ns=GIVEN_NS + 10),
        )
        assert found == ([2, 1, 0], "of 2 others, 2 met the end of a peer")

    def test_peer_errors_alone_go_by_time(self, tmp_path: Path) -> None:
        """Where all met the end of a peer, the first of them leads (R-ER-10)."""
        paths = [write(tmp_path / f"{rank}.json", ConnectionResetError(104, "x"), GIVEN_NS + rank) for rank in range(2)]
        found = [failure(rank, 1, path, detected_ns=GIVEN_NS + 9) for rank, path in enumerate(paths)]
        assert order(*found)[0] == [0, 1]


def caused(error: Exception, by: Exception) -> Exception:
    error.__cause__ = by
    return error


class PeerFailedError(Exception):
    pass


class TestPeerErrors:
    @pytest.mark.parametrize(
        ("error", "is_one"),
        [
            (ConnectionResetError(104, "Connection reset by peer"), True),
            (BrokenPipeError(32, "Broken pipe"), True),
            (RuntimeError(GLOO), True),
            (
                RuntimeError(
                    "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation"
                ),
                True,
            ),
            (
                RuntimeError("NCCL error: remote process exited or there was a network error\nncclRemoteError: ..."),
                True,
            ),
            (RuntimeError("NET/Socket: Connection closed by remote peer node7<4242>"), True),
            (RuntimeError("wait timeout after 300000ms, keys: /default_pg/0//worker_count"), True),
            (RuntimeError("Failed to recv, got 0 bytes. Connection was likely closed."), True),
            (RuntimeError("NCCL error" + "." * 2000 + "ncclRemoteError" + "." * 2000), True),
            (caused(RuntimeError("step 7 failed"), ConnectionResetError(104, "x")), True),
            (caused(PeerFailedError("save failed on rank 3"), OSError(28, "disk full")), True),
            (ExceptionGroup("both", [RuntimeError(GLOO), BrokenPipeError(32, "x")]), True),
            (ExceptionGroup("one", [RuntimeError(GLOO), ValueError("x")]), False),
            (RuntimeError("NCCL error: invalid usage, Duplicate GPU detected : rank 1 and rank 0"), False),
            (RuntimeError("DataLoader timed out after 30 seconds"), False),
            (TimeoutError("timed out"), False),
            (caused(ValueError("x"), KeyError("y")), False),
        ],
        ids=lambda value: f"{type(value).__name__}-{str(value)[:24]}" if isinstance(value, Exception) else None,
    )
    def test_in_files(self, tmp_path: Path, error: Exception, is_one: bool) -> None:
        """A peer's end is known by type, by text and by cause, in files of ours (R-ER-10)."""
        path = write(tmp_path / "a.json", error, GIVEN_NS)
        assert is_peer_error(failure(file=path)) is is_one

    @pytest.mark.parametrize(
        ("message", "is_one"),
        [
            ("ConnectionResetError: [Errno 104] x", True),
            ("torch.distributed.DistNetworkError: Connection was likely closed.", True),
            ("ValueError: ConnectionResetError", False),
        ],
    )
    def test_in_torchs_files(self, tmp_path: Path, message: str, is_one: bool) -> None:
        """A peer's end is known in torch's files, by the text alone (R-ER-10)."""
        for content in ({"message": message}, {"message": {"message": message, "extraInfo": {}}}):
            path = tmp_path / "a.json"
            path.write_text(json.dumps(content))
            assert is_peer_error(failure(file=path)) is is_one

    @pytest.mark.parametrize(
        ("exitcode", "output", "is_one"),
        [
            (-6, WATCHDOG, True),
            (-11, WATCHDOG, False),
            (-6, "free(): invalid pointer\n", False),
            (1, f"Traceback (most recent call last):\n  File x\nRuntimeError: {GLOO}\nbye\n", True),
            (1, f"Traceback (most recent call last):\n  File x\nRuntimeError: {GLOO}\n\nDuring handling of that, "
             "another occurred:\n\nTraceback (most recent call last):\n  File y\nValueError: x\n", False),
            (1, f"[rank3]: Traceback (most recent call last):\n[rank3]:   File x\n[rank3]: E: {GLOO}\n", True),
            (1, f"warning: {GLOO}\nTraceback (most recent call last):\n  File x\nValueError: x\n", False),
            (1, f"{GLOO}\n", False),
            (1, "Traceback (most recent call last):\n", False),
            (0, f"Traceback (most recent call last):\n  File x\nRuntimeError: {GLOO}\n", False),
        ],
        ids=["watchdog", "crash", "abort", "traceback", "handled", "ranked", "warned", "bare", "cut", "code-0"],
    )  # fmt: skip
    def test_in_the_output(self, exitcode: int, output: str, is_one: bool) -> None:
        """Without a file a peer's end is known by the last traceback, and by NCCL's watchdog at an abort (R-ER-10)."""
        assert is_peer_error(failure(exitcode=exitcode, output_tail=output)) is is_one

    @pytest.mark.parametrize(
        "exception", [7, {}, {"type": 7, "message": None, "cause": [], "exceptions": {}}, {"exceptions": [7]}]
    )
    def test_foreign_fields_are_no_peers(self, tmp_path: Path, exception: Any) -> None:
        """Fields of a foreign file may be of any type (E-67, R-ER-13)."""
        path = tmp_path / "a.json"
        path.write_text(json.dumps({"message": "m", "aiockpt": {"exception": exception}}))
        assert not is_peer_error(failure(file=path))

    def test_a_deep_foreign_chain_ends(self, tmp_path: Path) -> None:
        """A foreign chain of hundreds of causes is not followed to its end (E-67, R-ER-13)."""
        path = tmp_path / "a.json"
        path.write_text('{"message": "m", "aiockpt": {"exception": ' + '{"cause": ' * 800 + "{}" + "}" * 802)
        assert not is_peer_error(failure(file=path))


@pytest.mark.process
class TestReal:
    def test_a_killed_rank_before_its_peers_error(self, tmp_path: Path) -> None:
        """Of two real processes the killed one leads, though the other's error is recorded before detection (E-69)."""
        ours, theirs = socket.socketpair()
        script = (
            "import socket, sys; from aiockpt.elastic.failures.error_file import record\n"
            "@record\n"
            "def main():\n"
            "    peer = socket.socket(fileno=int(sys.argv[1])); print('ready', flush=True)\n"
            "    if not peer.recv(1): raise ConnectionResetError('the peer is gone')\n"
            "main()\n"
        )
        ranks = []
        for rank, end in enumerate((ours, theirs)):
            env = {**os.environ, "PYTHONPATH": PYTHON_PATH, "TORCHELASTIC_ERROR_FILE": str(tmp_path / f"{rank}.json")}
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-c", script, str(end.fileno())],
                    pass_fds=[end.fileno()],
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
            )
            end.close()
        for process in ranks:
            assert process.stdout is not None
            with process.stdout:
                assert process.stdout.readline() == b"ready\n"
        ranks[1].kill()
        codes = [process.wait(PATIENCE_SECONDS) for process in ranks]
        failures = [
            ProcessFailure(rank, ranks[rank].pid, codes[rank], str(tmp_path / f"{rank}.json")) for rank in range(2)
        ]
        assert failures[0].failed_ns < failures[1].failed_ns
        assert [each.local_rank for each in by_cause(failures)] == [1, 0]
        assert (failures[0].exitcode, failures[1].exitcode) == (1, -signal.SIGKILL)

    def test_gloo_says_what_we_know(self, tmp_path: Path) -> None:
        """What gloo raises where a real peer was killed is known, from the file and from the output (R-ER-10)."""
        script = (
            "import os, sys, torch, torch.distributed as dist; from aiockpt.elastic.failures.error_file import record\n"
            "@record\n"
            "def main():\n"
            "    rank = int(sys.argv[1])\n"
            "    dist.init_process_group('gloo', init_method='file://' + sys.argv[2], rank=rank, world_size=2)\n"
            "    while True:\n"
            "        dist.all_reduce(torch.zeros(1 << 16))\n"
            "        if rank == 1: os.kill(os.getpid(), 9)\n"
            "main()\n"
        )
        files = [tmp_path / f"{rank}.json" for rank in range(2)]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", script, str(rank), str(tmp_path / "store")],
                env={**os.environ, "PYTHONPATH": PYTHON_PATH, "TORCHELASTIC_ERROR_FILE": str(files[rank])},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        outputs = [process.communicate(timeout=PATIENCE_SECONDS)[1] for process in ranks]
        failures = [
            ProcessFailure(rank, ranks[rank].pid, ranks[rank].returncode, str(files[rank])) for rank in range(2)
        ]
        assert is_peer_error(failures[0]), failures[0].text()
        assert [each.local_rank for each in by_cause(failures)] == [1, 0]
        unrecorded = failure(0, failures[0].exitcode, output_tail=outputs[0])
        assert is_peer_error(unrecorded), outputs[0]


def test_recorded_here_is_earlier_than_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the record and that of detection are one (R-MP-19)."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "a.json"))
    monkeypatch.setattr(error_file.faulthandler, "enable", lambda **_: None)

    @record
    def main() -> None:
        raise ValueError("x")

    before_ns = time.monotonic_ns()
    with pytest.raises(ValueError, match="x"):
        main()
    found = failure(file=tmp_path / "a.json")
    assert before_ns < found.failed_ns < found.detected_ns
