"""The benchmark of several ranks, small."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from bench import ranks
from bench.__main__ import load_questions, parser_of
from bench.entrants import OURS, RANKS, Entry, Key
from bench.process import EntrantFailedError
from bench.rank_group import RankGroup, of_rank
from bench.table import render

pytestmark = [pytest.mark.process, pytest.mark.timeout(200)]

STATE_NBYTES = 2 << 20


def test_ours_alone_has_every_figure(tmp_path: Path) -> None:
    """Both ways in which the state lies on the ranks; each writes its part, and says what it holds."""
    given = ["ranks", "--world", "2", "--size", "2MiB", "--rounds", "1", "--peers", "none", "--dir", str(tmp_path)]
    report = ranks.measure(parser_of(load_questions()).parse_args(given), lambda text: None)
    assert [(row["system"], row["case"], row["ranks"]) for row in report.rows] == [
        (OURS, "sharded", 2),
        (OURS, "replicated", 2),
    ]
    for row in report.rows:
        assert 0 < row["blocked_s"] <= row["durable_s"]
        assert row["blocked_s"] >= max(row["blocked_s_of_ranks"]) > 0
        assert row["nbytes"] > STATE_NBYTES * 0.9
        assert max(row["staging_bytes_of_ranks"]) < row["nbytes"], "no rank takes all of it"
        for costs in row["costs_of_ranks"]:
            assert 0 < costs["start_s"] <= costs["formed_s"]
            assert 0 < costs["first_blocked_s"] <= costs["first_durable_s"]
            assert 0 < costs["trainer_fds"] <= 20
            assert costs["worker_bytes"] < 45 << 20, "no torch in there"
    text = render(report, ranks.COLUMNS)
    assert text.count("note: rank 0 of 2") == text.count("note: rank 1 of 2") == 2
    assert ranks.figure(report).line > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("key", "entry"), [(k, e) for k, e in RANKS.items() if k.system != OURS])
def test_a_peer_saves_all_of_it(key: Key, entry: Entry, tmp_path: Path) -> None:
    """All ranks at one moment; nothing of a discarded step stays."""
    if key.system == "torch_checkpointing":
        pytest.importorskip("torch_checkpointing")
    with RankGroup(entry, 2, STATE_NBYTES, tmp_path) as group:
        assert group.answer()["nbytes"] > STATE_NBYTES * 0.9
        times = group.ask("round")
        assert times["durable_s"] == max(times[of_rank("durable_s", rank)] for rank in range(2))
        written = sum(file.stat().st_size for file in (tmp_path / "step-1").rglob("*") if file.is_file())
        assert written > STATE_NBYTES * 0.9
        group.ask("discard")
        assert not (tmp_path / "step-1").exists()
        group.close()


def test_a_rank_that_fails_is_named(tmp_path: Path) -> None:
    """With the last line that it said."""
    entry = next(iter(RANKS.values()))._replace(place="bench.ours:Nobody")
    with pytest.raises(EntrantFailedError, match=r"rank 0: its process ended: .*Nobody"):  # noqa: SIM117
        with RankGroup(entry, 2, STATE_NBYTES, tmp_path) as group:
            group.answer()


@pytest.mark.parametrize("text", ["1", "2,1", "", "x"])
def test_a_job_has_two_ranks_at_least(text: str) -> None:
    """A single one is another question."""
    with pytest.raises(argparse.ArgumentTypeError):
        ranks._worlds(text)
