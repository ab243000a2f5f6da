"""What is computed from measurements, without measuring."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from bench.entrant import Key
from bench.results import Floors, Measured, Report, spread
from bench.sizes import seconds_text, size_argument, size_text
from bench.table import render

FLOORS = Floors({"memcpy": 2, "write": 1, "read": 8}, {"memcpy": [10.0, 12.0], "write": [2.0, 2.0], "read": [4.0]})


def measured() -> Measured:
    times = [{"blocked_s": b, "staged_s": b + 0.1, "durable_s": 1.0} for b in (0.3, 0.1, 0.2)]
    return Measured(Key("x", "y"), 10**9, 7, {"start_s": 0.25}, times, FLOORS, 5 * 2**30, 20, 30 * 2**20)


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
    """Rates and ratios go by the median; descriptors count from before the system was opened."""
    row = measured().row("save")
    assert row["blocked_s"] == 0.2
    assert row["blocked_s_min"] == 0.1
    assert row["durable_s"] == 1.0
    assert row["gbps"] == pytest.approx(1.0)
    assert row["ratio_to_floor"] == pytest.approx(2.0)
    assert row["blocked_ratio_to_memcpy"] == pytest.approx(2.2)
    assert (row["open_fds"], row["rounds"], row["start_s"]) == (13, 3, 0.25)


def test_the_row_of_a_restore() -> None:
    """The call's time against the read floor."""
    row = measured().row("restore")
    assert row["ratio_to_floor"] == pytest.approx(0.8)


def test_json_and_table_have_the_same_rows(tmp_path: Path) -> None:
    """The file has the parts that readers rely on; the table names every row and every skipped system."""
    machine = {
        "cpu": "C",
        "cores": 2,
        "memory_bytes": 1 << 34,
        "filesystem": "ext4",
        "kernel": "6",
        "python": "3.11",
        "packages": {"torch": "2"},
    }
    skipped = [{"system": "s", "case": "c", "why": "it is not there"}]
    rows = [measured().row("save")]
    report = Report("save", machine, {"size": 1}, FLOORS, rows, skipped, ["a note"])
    report.write(tmp_path / "x.json")
    content = json.loads((tmp_path / "x.json").read_text())
    assert set(content) == {"machine", "args", "floors", "rows", "skipped", "notes"}
    assert content["rows"] == rows
    text = render(report)
    for part in ("skipped: s (c): it is not there", "note: a note", "200 ms", "1 s", "2.00"):
        assert part in text
