"""The tally and its figures, pure."""

from __future__ import annotations

import threading
from typing import Any

import msgspec
import pytest

from aiockpt.coordinator.statistics import Durations, Phases, Rate, Statistics
from aiockpt.coordinator.tally import Tally
from aiockpt.errors import CommitUnknownError, SaveCancelledError, SaveTimeoutError, TornSnapshotError

OTHERS: dict[str, Any] = {
    "in_flight": 0,
    "plans": 1,
    "arena_capacity": None,
    "arena_nbytes": 4096,
    "arena_used_nbytes": 0,
    "arena_pinned": False,
    "worker_pid": 7,
    "worker_private_nbytes": None,
    "worker_restarts": 0,
}
"""What a coordinator adds."""


def test_durations_keep_count_total_last_and_longest() -> None:
    """Each one is a value of its own."""
    found = Durations()
    for seconds in (1.0, 3.0, 2.0):
        found = found.plus(seconds)
    assert found == Durations(count=3, total_s=6.0, last_s=2.0, max_s=3.0)
    assert Durations() == Durations(count=0, total_s=0.0, last_s=0.0, max_s=0.0)


def test_rates_are_of_the_last_time_and_of_all() -> None:
    """In 10**9 bytes a second; all bytes over all time, no mean of rates."""
    found = Rate().plus(4_000_000_000, 1.0).plus(1_000_000_000, 4.0)
    assert found == Rate(nbytes=5_000_000_000, seconds=5.0, last_gbps=0.25, gbps=1.0)
    assert Rate().plus(1, 0.0).gbps == 0.0


def test_a_fresh_tally_is_all_zeros() -> None:
    """Every phase stands there before the first save, so that nobody asks for what is missing."""
    found = Tally().statistics(**OTHERS)
    assert found.phases == Phases()
    assert (found.committed, found.last_step, found.last_committed_at) == (0, None, None)
    assert found.guard_wait == Durations()


def test_a_commit() -> None:
    """Counts, bytes, the worker's phases, the rate, the step, and whether direct I/O was refused."""
    tally = Tally()
    tally.committed(7, 3_000_000_000, {"write": 1.0, "sync": 0.5, "commit": 0.1, "buffered": 1.0})
    tally.committed(8, 1_000_000_000, {"write": 0.5, "sync": 0.5, "commit": 0.3, "buffered": 0.0})
    found = tally.statistics(**OTHERS)
    assert (found.committed, found.committed_nbytes, found.buffered, found.last_step) == (2, 4_000_000_000, 1, 8)
    assert found.write_rate == Rate(nbytes=4_000_000_000, seconds=2.5, last_gbps=1.0, gbps=1.6)
    assert found.phases.commit == Durations(count=2, total_s=0.4, last_s=0.3, max_s=0.3)


def test_a_commit_that_its_worker_did_not_live_to_tell_of() -> None:
    """It counts; no time is made up for it."""
    tally = Tally()
    tally.committed(7, 10, {})
    found = tally.statistics(**OTHERS)
    assert (found.committed, found.phases.write.count, found.write_rate) == (1, 0, Rate())


@pytest.mark.parametrize(
    ("error", "counted"),
    [
        (SaveTimeoutError("late"), {"failed"}),
        (CommitUnknownError("who knows"), {"failed"}),
        (TornSnapshotError("torn"), {"failed", "torn"}),
        (SaveCancelledError("stopped"), {"cancelled"}),
    ],
)
def test_how_a_save_can_end_badly(error: BaseException, counted: set[str]) -> None:
    """Torn ones are among the failed, cancelled ones are not."""
    tally = Tally()
    tally.failed(error)
    found = msgspec.to_builtins(tally.statistics(**OTHERS))
    assert {name for name in ("committed", "failed", "torn", "cancelled") if found[name]} == counted


def test_counting_from_many_threads_loses_nothing() -> None:
    """The thread that saves, the one that copies and the loop count at once."""
    tally = Tally()

    def count() -> None:
        for _ in range(500):
            tally.count("skipped")
            tally.spent("blocked", 1.0)
            tally.staged(2, 1.0)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = tally.statistics(**OTHERS)
    assert (found.skipped, found.staged_nbytes) == (2000, 4000)
    assert (found.phases.blocked.count, found.phases.blocked.total_s, found.stage_rate.nbytes) == (2000, 2000.0, 4000)


def test_figures_are_frozen_and_survive_json() -> None:
    """What is sent to another place comes back as the same value."""
    tally = Tally()
    tally.committed(7, 10, {"write": 1.0, "sync": 0.0, "commit": 0.0})
    found = tally.statistics(**OTHERS)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Statistics) == found
    with pytest.raises(AttributeError):
        found.committed = 2  # type: ignore[misc]
