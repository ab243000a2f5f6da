"""Whole benchmarks, small."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import cast

import pytest

from bench import runner
from bench.__main__ import QUESTIONS, main
from bench.entrants import OURS, SAVES, Entry, Key
from bench.floor_process import FloorProcess
from bench.floors import THREADS
from bench.memory import PeakSampler, tree_of

REPOSITORY = Path(__file__).resolve().parent.parent.parent

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a benchmark in this process, which has torch already."""
    command = [*map(str, arguments)]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            status = main(command)
        except SystemExit as exc:
            status = cast("int", exc.code)
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def test_save_with_a_peer_writes_every_figure(tmp_path: Path) -> None:
    """Ours in three cases and one peer; the JSON has all fields of each row, nothing stays in the directory."""
    report = tmp_path / "x.json"
    scratch = tmp_path / "scratch"
    done = bench(
        "save", "--size", "4MiB", "--rounds", "2", "--peers", "safetensors", "--dir", scratch, "--json", report
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(report.read_text())
    assert [(row["system"], row["case"]) for row in content["rows"]] == [
        ("aiockpt", "guarded"),
        ("aiockpt", "inline"),
        ("aiockpt", "first save after prepare"),
        ("safetensors", "save_file, fsync"),
    ]
    assert content["skipped"] == []
    for row in content["rows"]:
        assert 0 < row["blocked_s_min"] <= row["blocked_s"] <= row["durable_s"] <= row["durable_s_max"]
        assert row["peak_pss_bytes"] > 4 << 20
        assert row["rounds"] >= 2
    guarded = content["rows"][0]
    assert 0 < guarded["open_fds"] <= 16
    assert guarded["start_s"] > 0
    assert guarded["worker_bytes"] > 0
    assert content["floors"]["write_gbps"] > 0
    assert list(scratch.iterdir()) == []


def test_restore_says_how_the_cache_was_treated(tmp_path: Path) -> None:
    """Ours and torch.load; where the page cache cannot be dropped there is a note."""
    report = tmp_path / "x.json"
    done = bench(
        "restore", "--size", "4MiB", "--rounds", "2", "--peers", "torch.load", "--dir", tmp_path, "--json", report
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(report.read_text())
    assert [row["system"] for row in content["rows"]] == ["aiockpt", "torch.load"]
    for row in content["rows"]:
        assert 0 < row["ratio_to_floor_min"] <= row["ratio_to_floor"] <= row["ratio_to_floor_max"]
        assert row["floor_gbps"] > 0
    dropped = os.access("/proc/sys/vm/drop_caches", os.W_OK)
    assert dropped or any("page cache" in note for note in content["notes"])


def test_small_measures_a_dict_and_a_module(tmp_path: Path) -> None:
    """Also with few descriptors; a peer that needs one for each tensor is skipped with the limit that it met."""
    report = tmp_path / "x.json"
    size = ("--count", "200", "--nbytes", "1KiB", "--nofile", "100", "--rounds", "1")
    done = bench("small", *size, "--peers", "dcp.async_save process", "--dir", tmp_path, "--json", report)
    assert done.returncode == 0, done.stderr
    content = json.loads(report.read_text())
    assert [row["case"] for row in content["rows"]] == ["tensors", "module and optimizer"]
    assert [row["nbytes"] for row in content["rows"]] == [200 << 10] * 2
    assert all(row["open_fds"] <= 16 for row in content["rows"])
    (skipped,) = content["skipped"]
    assert skipped["system"] == "dcp.async_save process"
    assert "RLIMIT_NOFILE gave it 100" in skipped["why"]


def test_interference_has_a_row_for_each_snapshot_mode(tmp_path: Path) -> None:
    """As many steps with a save in flight as asked for, in blocks."""
    report = tmp_path / "x.json"
    steps = ("--size", "1MiB", "--steps", "5", "--block", "3", "--step-ms", "5", "--threads", "1")
    done = bench("interference", *steps, "--peers", "none", "--dir", tmp_path, "--json", report)
    assert done.returncode == 0, done.stderr
    content = json.loads(report.read_text())
    assert [row["case"] for row in content["rows"]] == ["guarded", "inline"]
    assert content["args"]["tokens"] >= 8
    for row in content["rows"]:
        assert row["steps"] == 5
        assert 1 <= row["saves"] <= 5
        assert row["step_ratio_median"] > 0
        assert row["step_ratio_p99"] > 0
        assert 0 <= row["guard_wait_s"] < row["step_saving_s"]
        assert row["blocked_s"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_missing_peer_is_skipped_by_name(tmp_path: Path) -> None:
    """The others are measured; the reason is the ImportError's."""
    ours = next(iter(SAVES))
    entries = {ours: SAVES[ours], Key("nobody", "default"): Entry("bench.peers.nobody:Nobody")}
    plan = runner.Plan(entries=entries, size=1 << 20, rounds=1, warmup=1, directory=tmp_path)
    outcome = runner.run(plan, runner.SaveTurns, lambda _: None)
    assert [measured.key.system for measured in outcome.measured] == [OURS]
    (skipped,) = outcome.skipped
    assert skipped["system"] == "nobody"
    assert "No module named 'bench.peers.nobody'" in skipped["why"]


def test_the_command_of_the_pages() -> None:
    """``python -m bench`` names its questions."""
    command = [sys.executable, "-m", "bench", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert all(question in done.stdout for question in QUESTIONS)


@pytest.mark.parametrize(
    "arguments", [("save", "--peers", "nobody"), ("save", "--size", "many"), ("nothing",), ("save", "--rounds", "0")]
)
def test_bad_arguments_exit_with_2(arguments: tuple[str, ...]) -> None:
    """Before anything is measured."""
    done = bench(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_floors_are_measured_with_the_best_number_of_threads(tmp_path: Path) -> None:
    """Chosen once, then sampled on demand; the process leaves no file."""
    with FloorProcess(1 << 20, tmp_path) as process:
        assert {floor: len(rates) for floor, rates in process.choose(2).items()} == {"memcpy": 2, "write": 2, "read": 2}
        assert all(process.threads[floor] in counts for floor, counts in THREADS.items())
        sample = process.sample(("write", "read"))
        assert list(sample) == ["write", "read"]
        assert all(rate > 0 for rate in sample.values())
    assert list(tmp_path.iterdir()) == []


def test_the_read_floor_is_that_of_the_given_files(tmp_path: Path) -> None:
    """All files below the path, whatever their size; before each try the caller gets to drop the cache."""
    (tmp_path / "x" / "y").mkdir(parents=True)
    for name, nbytes in (("x/one", 17 << 20), ("x/y/two", 5000), ("x/none", 0)):
        (tmp_path / name).write_bytes(bytes(nbytes))
    tries: list[None] = []
    with FloorProcess(1 << 20, tmp_path) as process:
        threads = process.choose_reading(tmp_path / "x", lambda: tries.append(None))
        assert threads in THREADS["read"]
        assert len(tries) == len(THREADS["read"])
        assert process.reading(tmp_path / "x", threads) > 0


def test_the_sampler_counts_children() -> None:
    """The peak of a process tree has the child's memory, which is also shown apart."""
    code = "import os, sys; data = bytearray(32 << 20); print(flush=True); sys.stdin.read()"
    with PeakSampler(os.getpid()) as peak:
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in tree_of(os.getpid())
    child.communicate()
    assert peak.peak_child_bytes > 32 << 20
    assert peak.peak_pss_bytes > peak.peak_child_bytes
    assert peak.peak_fds > 0
