"""The life of a save: the whole table, and what follows from it."""

from __future__ import annotations

from itertools import product

import pytest

from aiockpt.protocol.lifecycle import FINAL, TRANSITIONS, SaveEvent, SaveState, advance
from aiockpt.protocol.lifecycle import SaveEvent as E
from aiockpt.protocol.lifecycle import SaveState as S

MOVES = {
    (S.PLANNED, E.BEGIN): S.STAGING,
    (S.PLANNED, E.SKIP): S.SKIPPED,
    (S.STAGING, E.SKIP): S.SKIPPED,
    (S.STAGED, E.SKIP): S.SKIPPED,
    (S.PLANNED, E.FAIL): S.FAILED,
    (S.PLANNED, E.CANCEL): S.CANCELLED,
    (S.PLANNED, E.WORKER_DIED): S.PLANNED,
    (S.STAGING, E.STAGING_DONE): S.STAGED,
    (S.STAGING, E.FAIL): S.FAILED,
    (S.STAGING, E.CANCEL): S.CANCELLED,
    (S.STAGING, E.WORKER_DIED): S.STAGING,
    (S.STAGED, E.FILES_DURABLE): S.WRITTEN,
    (S.STAGED, E.FAIL): S.FAILED,
    (S.STAGED, E.CANCEL): S.CANCELLED,
    (S.STAGED, E.WORKER_DIED): S.STAGED,
    (S.WRITTEN, E.COMMIT_BEGUN): S.COMMITTING,
    (S.WRITTEN, E.FAIL): S.FAILED,
    (S.WRITTEN, E.CANCEL): S.CANCELLED,
    (S.WRITTEN, E.WORKER_DIED): S.STAGED,
    (S.COMMITTING, E.COMMIT_DONE): S.COMMITTED,
    (S.COMMITTING, E.FAIL): S.FAILED,
    (S.COMMITTING, E.LOSE): S.UNKNOWN,
    (S.COMMITTING, E.WORKER_DIED): S.STAGED,
}
"""Written out a second time, so that a change of the table is a change of two places."""


@pytest.mark.parametrize(("state", "event"), list(product(SaveState, SaveEvent)), ids=lambda value: value.value)
def test_every_pair(state: SaveState, event: SaveEvent) -> None:
    """Each pair of state and event is a move of the table, or refused by name."""
    if (state, event) in MOVES:
        assert advance(state, event) is MOVES[state, event]
    else:
        with pytest.raises(ValueError, match=f"{state.value} takes no {event.value}"):
            advance(state, event)


def test_final_states() -> None:
    """A save ends in one of five ways, and nothing moves it afterwards."""
    assert {S.COMMITTED, S.FAILED, S.CANCELLED, S.SKIPPED, S.UNKNOWN} == FINAL
    assert TRANSITIONS.keys() == set(SaveState)


def reachable(state: SaveState) -> set[SaveState]:
    seen = {state}
    todo = [state]
    while todo:
        for after in TRANSITIONS[todo.pop()].values():
            if after not in seen:
                seen.add(after)
                todo.append(after)
    return seen


def test_every_save_can_end() -> None:
    """From everywhere a final state can be reached, and from the start all of them."""
    assert reachable(S.PLANNED) == set(SaveState)
    for state in SaveState:
        assert reachable(state) & FINAL


def test_point_of_no_return() -> None:
    """From COMMITTING on nothing cancels; the outcome is unknown only there."""
    assert E.CANCEL not in TRANSITIONS[S.COMMITTING]
    assert [state for state in SaveState if E.LOSE in TRANSITIONS[state]] == [S.COMMITTING]
    assert [state for state in SaveState if S.COMMITTED in TRANSITIONS[state].values()] == [S.COMMITTING]


def test_death_of_a_worker_ends_no_save() -> None:
    """A worker's death takes a save back to what its successor can begin with, and never ends it."""
    for state in set(SaveState) - FINAL:
        assert advance(state, E.WORKER_DIED) in (S.PLANNED, S.STAGING, S.STAGED)
