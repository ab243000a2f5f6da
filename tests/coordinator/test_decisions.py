"""The coordinator's pure decisions: when to save, how often to restart, what to prune."""

import pytest

from aiockpt.config import Every, Latest, RestartPolicy
from aiockpt.coordinator.restarts import RestartBudget
from aiockpt.coordinator.retention import to_prune
from aiockpt.coordinator.schedule import Schedule
from aiockpt.errors import RestartLimitError


def test_steps_are_arithmetic_and_need_no_state() -> None:
    """``Every(steps=n)`` is due where (step + 1) % n == 0, whether or not a save began."""
    schedule = Schedule(Every(steps=3), now=0.0)
    assert [step for step in range(9) if schedule.due(step, now=0.0)] == [2, 5, 8]


def test_minutes_count_from_the_last_save_or_from_open() -> None:
    """``Every(minutes=m)`` stays due until a save begins, and counts anew from there."""
    schedule = Schedule(Every(minutes=1), now=100.0)
    assert schedule.due(0, now=159.9) is None
    assert schedule.due(1, now=160.0) == "every 1 minutes"
    assert schedule.due(2, now=190.0) is not None
    schedule.saved(2, now=190.0)
    assert schedule.due(3, now=249.9) is None
    assert schedule.due(4, now=250.0) is not None


def test_a_request_stands_until_a_save_begins() -> None:
    """``request_save`` answers with its reason at every step until ``save`` is called."""
    schedule = Schedule(None, now=0.0)
    assert schedule.due(0, now=9e9) is None
    schedule.request("preempted")
    assert schedule.due(1, now=0.0) == schedule.due(2, now=0.0) == "preempted"
    schedule.saved(2, now=0.0)
    assert schedule.due(3, now=0.0) is None


def test_a_request_between_due_and_save_is_not_served_by_that_save() -> None:
    """A loop that leaves by the reason would never hear of it; the same text twice is two requests."""
    schedule = Schedule(Every(steps=2), now=0.0)
    assert schedule.due(1, now=0.0) == "every 2 steps"
    for step in (2, 3):
        schedule.request("SIGTERM")
        schedule.saved(step - 1, now=0.0)
        assert schedule.due(step, now=0.0) == "SIGTERM"
    schedule.saved(3, now=0.0)
    assert schedule.due(4, now=0.0) is None


def test_the_restart_budget_follows_the_policy() -> None:
    """Delays in order, the last one again, and the limit as an error that says how often and in what time."""
    budget = RestartBudget(RestartPolicy(tries=3, window=10.0, delays=(0.0, 0.5)))
    assert [budget.spend(now) for now in (0.0, 1.0, 2.0)] == [0.0, 0.5, 0.5]
    with pytest.raises(RestartLimitError) as caught:
        budget.spend(3.0)
    assert (caught.value.restarts, caught.value.window) == (3, 10.0)
    assert "next:" in str(caught.value)
    assert budget.total == 3


def test_restarts_are_forgotten_after_the_window() -> None:
    """A restart older than the window counts no more, so the delays begin anew."""
    budget = RestartBudget(RestartPolicy(tries=1, window=10.0, delays=(0.0, 9.0)))
    assert [budget.spend(now) for now in (0.0, 10.0, 20.0)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("keep", "steps", "step", "gone"),
    [
        (None, [3, 2, 1], 4, []),
        (Latest(1), [], 0, []),
        (Latest(1), [3, 2], 4, [3, 2]),
        (Latest(3), [3, 2, 1, 0], 4, [1, 0]),
        (Latest(2), [3, 2, 1], 3, [1]),
    ],
)
def test_pruning_keeps_the_newest(keep: Latest | None, steps: list[int], step: int, gone: list[int]) -> None:
    """``Latest(n)`` counts the new checkpoint in, and never prunes one that is replaced."""
    assert to_prune(keep, steps, step) == gone
