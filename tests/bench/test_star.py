"""The benchmark of the star, small."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from bench import star
from bench.process import EntrantFailedError

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]


def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ranks: str) -> list[dict[str, object]]:
    monkeypatch.setattr(star, "_BEAT_SECONDS", 0.1)
    args = argparse.Namespace(ranks=ranks, rounds=2, warmup=1, dir=tmp_path, json=None, plot=None)
    report = star.measure(args, lambda text: None)
    assert star.figure(report).line > 0
    return report.rows


def test_every_figure_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (few, more) = measured(monkeypatch, tmp_path, "2,40")
    for column in star.COLUMNS:
        assert column.text(few)
        assert column.text(more)
    assert isinstance(few["descriptors"], int)
    assert more["descriptors"] == few["descriptors"] + 38
    assert isinstance(more["save_cpu_s"], float)
    assert more["save_cpu_s"] > 0


@pytest.mark.parametrize("ranks", ["1", "", "4,x"])
def test_no_numbers_of_ranks(ranks: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(EntrantFailedError, match="numbers of ranks"):
        measured(monkeypatch, tmp_path, ranks)
