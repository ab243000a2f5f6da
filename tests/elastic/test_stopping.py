"""When to do what to children that are to end."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiockpt.elastic.stopping import Step, Stop

seconds = st.floats(0, 3600, allow_nan=False)


def steps_until(stop: Stop, end: float) -> list[tuple[float, Step]]:
    """Take every step at the time for which it announces itself."""
    taken = []
    while (at := stop.next_at) is not None and at <= end:
        taken += [(at, step) for step in stop.due(at)]
    return taken


def test_the_steps_share_one_deadline() -> None:
    """Signal, stacks, kill and giving up lie within the time given, in this order (E-44, R-MP-22)."""
    assert steps_until(Stop(signal.SIGTERM, 30, 100), 1e9) == [
        (100, Step.SIGNAL),
        (128, Step.ASK_FOR_STACKS),
        (128.5, Step.KILL),
        (130, Step.GIVE_UP),
    ]


@given(timeout=seconds)
def test_every_stop_ends_in_time(timeout: float) -> None:
    """It ends at its deadline; only the wait for a kill has its least (R-MP-21)."""
    taken = steps_until(Stop(signal.SIGTERM, timeout, 0), 1e9)
    assert [step for _, step in taken] == list(Step)
    at = {step: when for when, step in taken}
    assert at[Step.KILL] <= timeout
    assert at[Step.GIVE_UP] == pytest.approx(max(timeout, at[Step.KILL] + 1.5))


def test_a_kill_leaves_out_what_comes_before() -> None:
    """SIGKILL as the death signal is one step, and the wait for it."""
    assert steps_until(Stop(signal.SIGKILL, 0, 5), 1e9) == [(5, Step.KILL), (6.5, Step.GIVE_UP)]


def test_a_second_signal_shortens_and_a_third_one_kills() -> None:
    """None of them ends the stop (E-38, R-MP-29)."""
    stop = Stop(signal.SIGTERM, 30, 0)
    assert stop.due(0) == [Step.SIGNAL]
    stop.hasten(1)
    assert stop.next_at == pytest.approx(6 - 5 * 0.25)
    stop.hasten(2)
    assert stop.due(2) == [Step.ASK_FOR_STACKS, Step.KILL]
    assert stop.next_at == pytest.approx(3.5)
    stop.hasten(3)
    assert stop.due(3.5) == [Step.GIVE_UP]
    assert stop.next_at is None


@given(timeout=seconds, shorter=seconds, at=seconds)
def test_shortening_never_lengthens(timeout: float, shorter: float, at: float) -> None:
    """Whatever is asked for, each step comes when it would have come or sooner (R-MP-22)."""
    plain = {step: when for when, step in steps_until(Stop(signal.SIGTERM, timeout, 0), 1e9)}
    stop = Stop(signal.SIGTERM, timeout, 0)
    taken = steps_until(stop, at)
    stop.shorten(at, shorter)
    taken += steps_until(stop, 1e9)
    assert sorted(step.value for _, step in taken) == [step.value for step in Step]
    assert all(when <= plain[step] for when, step in taken)


def test_each_step_is_due_once() -> None:
    """A late look takes all that is due, in order, and nothing twice."""
    stop = Stop(signal.SIGTERM, 1, 0)
    assert stop.due(100) == list(Step)
    assert stop.due(200) == []
