"""The benchmark of the exchange of plans, small."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import exchange
from bench.__main__ import load_questions, parser_of
from bench.table import render

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]


def test_both_ways_have_every_figure(tmp_path: Path) -> None:
    """A worker of the star has no torch; one with a group is dearer in every respect that is not noise."""
    given = ["exchange", "--world", "3", "--rounds", "2", "--dir", str(tmp_path)]
    report = exchange.measure(parser_of(load_questions()).parse_args(given), lambda text: None)
    star, gloo = report.rows
    assert (star["case"], gloo["case"]) == ("star", "group")
    for row in (star, gloo):
        assert 0 < row["group_s"] < row["ready_s"]
        assert 0 < row["exchange_s_min"] <= row["exchange_s"]
        assert row["rounds"] == 2
    assert star["import_s"] == 0 < gloo["import_s"]
    assert star["rss_bytes"] < gloo["rss_bytes"] / 2
    assert "gloo" in render(report, exchange.COLUMNS)
    assert exchange.figure(report).line > 0
    assert list(tmp_path.iterdir()) == []
