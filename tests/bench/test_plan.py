"""The simulation of many ranks: every figure is there, and grows as planning does."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from bench import plan
from bench.__main__ import main
from bench.entrants import OURS
from bench.plot import draw
from bench.results import Report
from bench.table import render


def measured(directory: Path, ranks: str, **options: str) -> Report:
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    args = parser.parse_args(["--ranks", ranks, "--tensors", "30", "--dir", str(directory), *given])
    return plan.measure(args, lambda text: None)


def test_ranks_cost_rank_0_a_digest_each(tmp_path: Path) -> None:
    """One body however many ranks there are; its bytes do not grow with them."""
    report = measured(tmp_path, "128,2", peers="none")
    assert {row["system"] for row in report.rows} == {OURS}
    rows = {(row["case"], row["ranks"]): row for row in report.rows}
    assert len(rows) == 8
    few, many = rows["FSDP", 2], rows["FSDP", 128]
    assert (few["bodies"], many["bodies"], rows["FSDP in 64 stages", 128]["bodies"]) == (1, 1, 64)
    assert (few["entries"], many["entries"], rows["FSDP in 64 stages", 128]["entries"]) == (90, 90, 64 * 90)
    assert many["later_bytes"] == 64 * few["later_bytes"]
    assert abs(many["body_bytes"] - few["body_bytes"]) < 20
    assert many["manifest_bytes"] - few["manifest_bytes"] < 126 * 3 * 200
    text = render(report, plan.COLUMNS)
    assert "floors" not in text
    report.write(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["rows"] == report.rows


def test_the_peer_is_measured_beside_it(tmp_path: Path) -> None:
    """Its own planner functions, on as many ranks; the figure has both."""
    pytest.importorskip("matplotlib")
    report = measured(tmp_path, "3")
    assert report.skipped == []
    (row,) = [row for row in report.rows if row["system"] != OURS]
    assert (row["ranks"], row["entries"], row["cached_s"]) == (3, 90, None)
    assert row["received_bytes"] > 3 * 1000
    draw(plan.figure(report), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table with a line for each case and number of ranks."""
    assert main(["plan", "--ranks", "2", "--tensors", "3", "--peers", "none", "--dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line.startswith(OURS)] == [OURS] * 4
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--ranks", "2,x"])
