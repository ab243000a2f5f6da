"""The writer's part of a restore of several ranks: what each of them counts, votes and renames."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aiockpt.coordinator.restoring import Restoring
from aiockpt.errors import ConfigError, StorageError
from aiockpt.restoring.run import RestoreOutcome
from aiockpt.storage.run_directory import Unreadable, scan
from tests.coordinator.meeting_hub import MeetingHub
from tests.restoring.ranked import by_dim, write_ranks
from tests.support import PATIENCE_SECONDS

WORLD = 2


class Claim:
    """What was renamed; the directories stay."""

    def __init__(self, run: Path) -> None:
        self.bad: list[Unreadable] = scan(str(run)).unreadable
        self.marked: list[int] = []
        self.refuses = False

    def mark_bad(self, found: Any, why: str) -> None:
        if self.refuses:
            raise StorageError("a bad checkpoint was not renamed", path=found.path)
        self.marked.append(found.step)


class Job:
    def __init__(self, run: Path, hub: MeetingHub) -> None:
        self.claims = [Claim(run) for _ in range(WORLD)]
        self.live: list[dict[str, Any]] = [{"model": {"w": torch.zeros(6)}} for _ in range(WORLD)]
        parts: Any = SimpleNamespace(sync_pending=lambda: None, checkpoints={}, forget=lambda step: None)
        self.restoring = [
            Restoring(str(run), claim, parts, parts, parts, parts, rank=rank, meetings=hub.meetings[rank])  # type: ignore[arg-type]
            for rank, claim in enumerate(self.claims)
        ]

    def restore(self, rank: int, *, include: Any = None, step: int | None = None) -> RestoreOutcome | None:
        restoring = self.restoring[rank]
        targets = restoring.begin(self.live[rank], include=include, exclude=None)
        return restoring.read(targets, step=step, strict=True, stop=threading.Event())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2):
        write_ranks(tmp_path, [{"model": {"w": torch.arange(6.0)}}] * WORLD, by_dim(0, WORLD), step=step)
    return tmp_path


def on_all(job: Job, **options: Any) -> list[RestoreOutcome]:
    with ThreadPoolExecutor(WORLD) as pool:
        futures = [pool.submit(job.restore, rank, **options) for rank in range(WORLD)]
        outcomes = [future.result(PATIENCE_SECONDS) for future in futures]
    assert all(outcome is not None for outcome in outcomes)
    return outcomes  # type: ignore[return-value]


@pytest.mark.parametrize("file", ["manifest.json", "model/model-00002-of-00002.safetensors"])
def test_rank_0_alone_renames_what_is_bad(file: str, run: Path) -> None:
    """A damaged head when an older one was restored, all else when it is passed over."""
    (run / "step-2" / file).write_bytes(b"{}")
    with MeetingHub(WORLD) as hub:
        job = Job(run, hub)
        assert [outcome.step for outcome in on_all(job)] == [1, 1]
    assert [claim.marked for claim in job.claims] == [[2], []]


def test_a_head_that_cannot_be_renamed_then_is_no_error(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The others have returned."""
    (run / "step-2" / "manifest.json").write_bytes(b"{}")
    with MeetingHub(WORLD) as hub:
        job = Job(run, hub)
        job.claims[0].refuses = True
        assert [outcome.step for outcome in on_all(job)] == [1, 1]
    assert "step 2 is damaged and stays under its name" in caplog.text


def test_a_call_that_is_refused_counts_and_fails_on_all(run: Path) -> None:
    with MeetingHub(WORLD) as hub, ThreadPoolExecutor(1) as pool:
        job = Job(run, hub)
        waiting = pool.submit(job.restore, 0)
        with pytest.raises(ConfigError) as own:
            job.restore(1, include=5)
        assert "(rank 1 on host " in own.value.what
        with pytest.raises(ConfigError) as caught:
            waiting.result(PATIENCE_SECONDS)
        assert caught.value.what == own.value.what
        assert [outcome.step for outcome in on_all(job)] == [2, 2]


def test_calls_that_differ_are_written_as_people_do(run: Path) -> None:
    with MeetingHub(WORLD) as hub, ThreadPoolExecutor(1) as pool:
        job = Job(run, hub)
        waiting = pool.submit(job.restore, 0, step=1)
        for call in (lambda: job.restore(1), lambda: waiting.result(PATIENCE_SECONDS)):
            with pytest.raises(ConfigError, match="do not agree") as caught:
                call()
            assert "rank 0 called restore(step=1)" in caught.value.why
            assert "rank 1 called restore()" in caught.value.why
