"""What is computed from measurements, without measuring."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from bench import arguments, interference, restore, save, small
from bench.__main__ import load_questions, parser_of
from bench.entrants import INTERFERENCES, OURS, RESTORES, SAVES, SMALLS, Key
from bench.plot import draw
from bench.results import Floors, Measured, Report, Round, percentile, spread
from bench.sizes import seconds_text, size_argument, size_text
from bench.table import render

PAGE = Path(__file__).resolve().parent.parent.parent / "docs/benchmarks.md"
FLOORS = Floors({"memcpy": 2, "write": 1, "read": 8}, {"memcpy": [10.0, 12.0], "write": [2.0, 2.0], "read": [4.0]})
MACHINE = {
    "cpu": "C",
    "cores": 2,
    "memory_bytes": 1 << 34,
    "filesystem": "ext4",
    "kernel": "6",
    "python": "3.11",
    "packages": {"torch": "2"},
}


def saved() -> Measured:
    rounds = [
        Round({"blocked_s": b, "staged_s": b + 0.1, "durable_s": 1.0}, {"write": write, "memcpy": 11.0})
        for b, write in ((0.3, 1.0), (0.1, 2.0), (0.2, 4.0))
    ]
    opened = {"nbytes": 10**9, "descriptors": 7, "start_s": 0.25, "fsyncs": True}
    return Measured(Key(OURS, "y"), opened, rounds, 5 * 2**30, 20, 30 * 2**20)


def restored() -> Measured:
    rounds = [Round({"blocked_s": took}, {"read": rate}) for took, rate in ((1.0, 2.0), (2.0, 1.0), (3.0, 1.0))]
    return Measured(Key(OURS, "y"), {"nbytes": 10**9, "descriptors": 7}, rounds)


def trained() -> dict[str, object]:
    series = interference._Series()
    series.add({"steps_s": [0.1] * 99 + [0.2]}, {"steps_s": [0.11] * 98 + [0.4] * 2, **OF_THE_SAVES})
    return series.row(Measured(Key(OURS, "y"), {"nbytes": 10**9, "descriptors": 7}), FLOORS)


OF_THE_SAVES = {"waits_s": [0.0] * 99 + [0.05], "blocked_s": [0.01] * 50, "durable_s": [1.0] * 49}


@pytest.mark.parametrize(
    ("text", "nbytes"), [("2GiB", 2 << 30), ("64MiB", 64 << 20), ("1.5 kib", 1536), ("7", 7), ("1GB", 10**9)]
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    """A size may be written as people write it."""
    assert size_argument(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1XiB", "0", "1e3"])
def test_nonsense_is_no_size(text: str) -> None:
    """Anything else is refused with an example."""
    with pytest.raises(argparse.ArgumentTypeError, match="64MiB"):
        size_argument(text)


def test_quantities_as_text() -> None:
    """Three digits and a unit."""
    assert [size_text(n) for n in (5, 2 << 30, 1000 << 20)] == ["5 B", "2 GiB", "1000 MiB"]
    assert [seconds_text(s) for s in (0.0104, 1.0, None)] == ["10.4 ms", "1 s", "-"]


def test_spread_is_median_and_extremes() -> None:
    """Nothing measured is None, not zero."""
    assert spread("a", [3.0, 1.0, 2.0]) == {"a": 2.0, "a_min": 1.0, "a_max": 3.0}
    assert spread("a", []) == {"a": None, "a_min": None, "a_max": None}


@pytest.mark.parametrize(("count", "found"), [(1, 1), (100, 99), (200, 198), (201, 199)])
def test_a_percentile_is_a_value_that_was_measured(count: int, found: int) -> None:
    """The least that 99 of 100 do not exceed."""
    assert percentile([float(n) for n in range(count, 0, -1)], 0.99) == found


def test_floors_have_extremes_and_threads() -> None:
    """As the JSON file says them."""
    floors = Floors({"write": 4})
    for rate in (2.0, 4.0, 3.0):
        floors.add({"write": rate})
    assert floors.as_json() == {
        "write_gbps": 3.0,
        "write_gbps_min": 2.0,
        "write_gbps_max": 4.0,
        "threads": {"write": 4},
    }


def test_the_row_of_a_save() -> None:
    """Ratios are taken round by round, against the floor of that round; descriptors count from before the opening."""
    row = saved().row("durable_s", "write")
    assert (row["blocked_s"], row["blocked_s_min"], row["durable_s"]) == (0.2, 0.1, 1.0)
    assert row["gbps"] == pytest.approx(1.0)
    ratios = [row["ratio_to_floor"], row["ratio_to_floor_min"], row["ratio_to_floor_max"]]
    assert ratios == pytest.approx([2.0, 1.0, 4.0])
    assert row["floor_gbps"] == 2.0
    assert row["blocked_ratio_to_memcpy"] == pytest.approx(2.2)
    assert (row["open_fds"], row["rounds"], row["start_s"], row["fsyncs"]) == (13, 3, 0.25, True)


def test_the_row_of_a_restore() -> None:
    """Each round against its own reading of the same files: the median of the ratios, not the ratio of medians."""
    row = restored().row("blocked_s", "read")
    assert row["ratio_to_floor"] == pytest.approx(2.0)
    assert (row["ratio_to_floor_min"], row["ratio_to_floor_max"]) == pytest.approx((2.0, 3.0))
    assert row["open_fds"] is None


def test_the_row_of_interference() -> None:
    """Median against median, p99 against p99; a save's cost is all that steps lost, and what it blocked."""
    row = trained()
    assert row["step_ratio_median"] == pytest.approx(1.1)
    assert row["step_ratio_p99"] == pytest.approx(4.0)
    assert (row["guard_wait_s"], row["guard_wait_s_max"], row["guard_wait_p99_s"]) == (0.0, 0.05, 0.0)
    assert row["cost_s"] == pytest.approx((98 * 0.11 + 0.8 - 100 * 0.101 + 0.5) / 50)
    assert (row["steps"], row["saves"], row["gbps"], row["ratio_to_floor"]) == (100, 50, 1.0, 2.0)


@pytest.mark.parametrize("question", [save, small, restore, interference])
def test_json_table_and_figure_have_the_same_rows(question: object, tmp_path: Path) -> None:
    """The file has the parts that readers rely on; the table names every row and every skipped system."""
    row = {
        save: lambda: saved().row("durable_s", "write"),
        small: lambda: saved().row("durable_s", "write"),
        restore: lambda: restored().row("blocked_s", "read"),
        interference: trained,
    }[question]()
    skipped = [{"system": "s", "case": "c", "why": "it is not there"}]
    report = Report(MACHINE, {"count": 5, "nbytes": 4096}, FLOORS, [row], skipped, ["a note"])
    report.write(tmp_path / "x.json")
    content = json.loads((tmp_path / "x.json").read_text())
    assert set(content) == {"machine", "args", "floors", "rows", "skipped", "notes"}
    assert content["rows"] == [row]
    assert {"memcpy_gbps", "write_gbps", "read_gbps"} <= set(content["floors"])
    text = render(report, question.COLUMNS)
    for part in ("skipped: s (c): it is not there", "note: a note", OURS, "954 MiB"):
        assert part in text


def test_a_figure_is_drawn(tmp_path: Path) -> None:
    """A PNG file, without a display."""
    pytest.importorskip("matplotlib")
    report = Report(MACHINE, {}, FLOORS, [saved().row("durable_s", "write")], [], [])
    draw(save.figure(report), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_ours_is_always_measured() -> None:
    """Also without peers, and it comes first."""
    for entries in (SAVES, SMALLS, RESTORES, INTERFERENCES):
        assert {key.system for key in arguments.chosen(entries, "none")} == {OURS}
        assert next(iter(arguments.chosen(entries, "all"))).system == OURS
        assert arguments.chosen(entries, "all") == entries


def test_the_commands_of_the_page_are_understood() -> None:
    """Each line in docs/benchmarks.md that runs a benchmark."""
    parser = parser_of(load_questions())
    lines = [line.split(" -m bench ")[1] for line in PAGE.read_text().splitlines() if " -m bench " in line]
    assert {parser.parse_args(line.split()).question for line in lines} >= {"save", "restore", "small", "interference"}


def test_a_peer_is_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    """One that is not there is refused with the names of those that are."""
    assert {key.system for key in arguments.chosen(SAVES, "torch.save, dcp.save")} == {OURS, "torch.save", "dcp.save"}
    with pytest.raises(SystemExit, match="2"):
        arguments.chosen(SAVES, "nobody")
    assert "torchsnapshot" in capsys.readouterr().err
