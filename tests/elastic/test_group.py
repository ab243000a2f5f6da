"""Who lives, who has ended, and what that means: as data."""

from __future__ import annotations

import signal

import pytest

from aiockpt.elastic.failures.process_failure import Cause
from aiockpt.elastic.group import Group


def launched(nprocs: int, *, owes_value: bool = False) -> Group:
    group = Group(nprocs, owes_value=owes_value)
    for rank in range(nprocs):
        group.launch(rank, 100 + rank)
    return group


@pytest.mark.parametrize(
    ("owes_value", "exitcode", "has_value", "sent", "cause"),
    [
        (False, 0, False, None, None),
        (False, 3, False, None, Cause.OWN),
        (False, -9, False, None, Cause.OWN),
        (False, -15, False, signal.SIGTERM, Cause.STOPPED),
        (False, 0, False, signal.SIGTERM, None),
        (True, 0, True, None, None),
        (True, 0, False, None, Cause.NO_RESULT),
        (True, 0, False, signal.SIGTERM, Cause.STOPPED),
        (True, 1, True, None, Cause.OWN),
        (True, 1, False, None, Cause.OWN),
    ],
)
def test_the_cause_of_an_end(
    owes_value: bool, exitcode: int, has_value: bool, sent: signal.Signals | None, cause: Cause | None
) -> None:
    """Exit code, value and what we had sent decide why a process ended (E-32, E-46, R-MP-15, R-MP-18)."""
    group = launched(1, owes_value=owes_value)
    if sent is not None:
        group.sent([0], sent, 6)
    group.end(0, exitcode, 7, has_value=has_value)
    assert group.ends[0].cause is cause
    assert group.has_failed == (cause is not None)
    assert group.is_over


def test_ends_are_numbered_as_they_come() -> None:
    """The order of detection is kept, and not that of ranks (E-69, R-MP-19)."""
    group = launched(3)
    for rank in (2, 0, 1):
        group.end(rank, 1, 7, has_value=False)
    assert sorted(group.ends, key=lambda rank: group.ends[rank].order) == [2, 0, 1]


def test_all_or_nothing() -> None:
    """It is over when all have ended; what still lives is known until then (E-45, R-MP-11)."""
    group = launched(3)
    group.end(1, 1, 7, has_value=False)
    assert not group.is_over
    assert group.living == [0, 2]
    group.sent([0, 2], signal.SIGTERM, 7)
    group.end(0, 1, 8, has_value=False)
    group.abandon(9)
    assert group.is_over
    assert {rank: end.cause for rank, end in group.ends.items()} == {1: Cause.OWN, 0: Cause.STOPPED, 2: Cause.STOPPED}
    assert group.signals_sent == ["SIGTERM"]


def test_a_lost_guardian_ends_all() -> None:
    """What ran under a guardian that is gone has ended with it, and says so."""
    group = launched(2)
    group.end(0, 0, 7, has_value=False)
    group.lose(8)
    assert group.ends[0].cause is None
    assert (group.ends[1].cause, group.ends[1].exitcode) == (Cause.GUARDIAN, -9)
