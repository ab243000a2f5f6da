"""The benchmark of supervised processes, small."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench import processes
from bench.__main__ import load_questions, parser_of
from bench.entrants import OURS
from bench.process import EntrantFailedError
from bench.results import Report
from bench.supervised import Supervisor
from bench.table import render
from bench.teed_lines import tee
from bench.trainees import LINE_NBYTES, line_of, work_of
from tests.support import ROOT, is_alive
from tests.waiting import wait_until

pytestmark = [pytest.mark.process, pytest.mark.timeout(200)]

ENTRIES = list(processes.SUPERVISORS.items())


def measured(tmp_path: Path, *given: str) -> Report:
    arguments = ["processes", "--lines", "1000", "--rounds", "1", "--dir", str(tmp_path), *given]
    report = processes.measure(parser_of(load_questions()).parse_args(arguments), lambda text: None)
    assert list(tmp_path.iterdir()) == []
    return report


def test_every_figure_is_there(tmp_path: Path) -> None:
    """Ours with 1 and 3 children: times in order, no line lost, and what a further child takes."""
    report = measured(tmp_path, "--children", "1,3", "--peers", "none")
    assert [(row["case"], row["children"]) for row in report.rows] == [
        ("programs", 1),
        ("functions", 1),
        ("programs", 3),
        ("functions", 3),
    ]
    for row in report.rows:
        assert row["system"] == OURS
        assert 0 < row["start_s_min"] <= row["start_s"] <= row["start_s_max"]
        assert 0 < row["death_known_s"] <= row["death_noticed_s"]
        assert 0 < row["threads"] < 10
        assert 0 < row["open_fds"] < 50
        assert row["rounds"] == 1
    few, _, many, _ = report.rows
    assert few["lines_per_s"] > 0
    assert (few["lines_lost"], many["lines_lost"]) == (0, 0)
    assert 0 <= few["idle_cpu_s_per_s"] < 0.5
    assert few["threads"] == many["threads"], "none for each child"
    text = render(report, processes.COLUMNS)
    assert "each further child of aiockpt, programs: 0.0 threads" in text
    assert processes.figure(report).line > 0


@pytest.mark.parametrize(("key", "entry"), ENTRIES, ids=[f"{key.system} {key.case}".strip() for key, _ in ENTRIES])
def test_everybody_supervises(key: object, entry: processes.Entry, tmp_path: Path) -> None:
    """A death is noticed, lines come out of both ends, and a group that goes through the gate succeeds."""
    with Supervisor(entry, tmp_path) as supervisor:
        with supervisor.group("programs", 2) as group:
            assert group.start_s > 0
            times = group.kill_one(0)
            assert 0 < times["death_known_s"] <= times["death_noticed_s"]
        with supervisor.group("printers", 2, tee=True, lines=50) as group:
            assert group.look().fds > 0
            assert tee(supervisor, group, 2, 50)["lines_lost"] == 0


def test_a_child_that_fails_by_itself_is_told(tmp_path: Path) -> None:
    """A group that was to succeed, and did not, is no measurement."""
    with Supervisor(ENTRIES[0][1], tmp_path) as supervisor:  # noqa: SIM117
        with pytest.raises(EntrantFailedError, match="2 of its children failed"):
            with supervisor.group("programs", 2) as group:
                os.kill(group.pids[0], signal.SIGKILL)
                wait_until(lambda: not Path(f"/proc/{group.pids[1]}").exists(), "the other one is stopped")


@pytest.mark.parametrize("entry", [entry for _, entry in ENTRIES[:2]], ids=["ours", "torch"])
def test_nothing_is_left_where_the_measuring_process_is_killed(entry: processes.Entry, tmp_path: Path) -> None:
    """The supervisors stop their groups then, which wait at a gate that nobody opens any more."""
    script = f"""if True:
        import os, pathlib, signal
        from bench.entrants import Entry
        from bench.supervised import Supervisor
        with Supervisor(Entry({entry.place!r}), pathlib.Path({str(tmp_path)!r})) as supervisor:
            with supervisor.group("programs", 2) as group:
                print(supervisor.process.pid, *group.pids, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    for pid in map(int, killed.stdout.split()):
        wait_until(lambda: not is_alive(pid), f"{pid} is gone")  # noqa: B023  # called at once


def test_a_supervisor_that_does_not_come_up_is_named(tmp_path: Path) -> None:
    """With the last line that it said, and no pipe of it stays open."""
    entry = ENTRIES[0][1]._replace(place="bench.supervising:Nobody")
    with pytest.raises(EntrantFailedError, match="Nobody"), Supervisor(entry, tmp_path):
        pass


def test_printed_lines_are_told_apart() -> None:
    """Each line is another, of one length; a kind that there is not is an error."""
    lines = {line_of(rank, n) for rank in range(64) for n in range(10)}
    assert len(lines) == 640
    assert {len(line) + 1 for line in lines} == {LINE_NBYTES}
    with pytest.raises(ValueError, match="dancers"):
        work_of("dancers", 1, "", "", 0)
