"""The desk: one slot, whoever waits for it, and failures that nobody has heard of."""

from __future__ import annotations

import threading

import pytest

from aiockpt.coordinator.desk import Desk
from aiockpt.coordinator.save_record import SaveRecord
from aiockpt.errors import SaveError, UsageError
from aiockpt.protocol.lifecycle import SaveEvent


def record(step: int = 0) -> SaveRecord:
    return SaveRecord(step, timeout=None)


def failed(desk: Desk, step: int) -> SaveRecord:
    save = record(step)
    desk.add(save)
    save.move(SaveEvent.FAIL)
    save.outcome.set_exception(SaveError(f"step {step} failed"))
    desk.remove(save)
    return save


def test_the_slot_has_one_holder_and_only_it_frees() -> None:
    """A second taker is refused, and freeing by somebody else does nothing."""
    desk, first, second = Desk(), record(), record()
    assert desk.take_slot(first)
    assert not desk.take_slot(second)
    desk.free_slot(second)
    assert desk.holder is first
    desk.free_slot(first)
    assert desk.take_slot(second)


def test_waiting_for_the_slot_tells_once_and_goes_on() -> None:
    """Past its patience the waiter is told why, once; it gets the slot when that is freed."""
    desk, first, second = Desk(), record(), record()
    desk.take_slot(first)
    told = threading.Event()
    freer = threading.Thread(target=lambda: (told.wait(10), desk.free_slot(first)))
    freer.start()
    assert desk.wait_slot(second, patience=0.001, timeout=10, on_slow=told.set)
    freer.join()
    assert desk.holder is second


def test_waiting_for_the_slot_ends_at_its_timeout() -> None:
    """A wait with a timeout gives up with False and leaves the holder alone."""
    desk, first = Desk(), record()
    desk.take_slot(first)
    assert not desk.wait_slot(record(), patience=10, timeout=0.001, on_slow=lambda: None)
    assert desk.holder is first


def test_closing_refuses_takers_and_wakes_waiters() -> None:
    """Who waits for the slot when the desk closes gets the error that it was closed with."""
    desk, first = Desk(), record()
    desk.take_slot(first)
    outcome: list[BaseException] = []

    def wait() -> None:
        try:
            desk.wait_slot(record(), patience=0.001, timeout=None, on_slow=waiting.set)
        except UsageError as exc:
            outcome.append(exc)

    waiting = threading.Event()
    waiter = threading.Thread(target=wait)
    waiter.start()
    assert waiting.wait(10)
    desk.close(lambda: UsageError("closed"))
    waiter.join(10)
    assert len(outcome) == 1
    with pytest.raises(UsageError):
        desk.take_slot(record())
    assert desk.when_free().done()


def test_closing_between_slot_and_save() -> None:
    """A save that took the slot before the desk was closed is not added behind it: nobody would end it."""
    desk, save = Desk(), record()
    assert desk.take_slot(save)
    desk.close(lambda: UsageError("closed"))
    with pytest.raises(UsageError, match="closed"):
        desk.add(save)
    assert desk.in_flight() == []
    assert desk.when_idle().done()


def test_when_free_and_when_idle_resolve_at_the_event() -> None:
    """The futures are done at once where there is nothing to wait for, else exactly at the event."""
    desk, save = Desk(), record()
    assert desk.when_free().done()
    assert desk.when_idle().done()
    desk.take_slot(save)
    desk.add(save)
    free, idle = desk.when_free(), desk.when_idle()
    assert not free.done()
    assert not idle.done()
    desk.free_slot(save)
    assert free.done()
    assert not idle.done()
    save.outcome.set_result(None)
    desk.remove(save)
    assert idle.done()


def test_a_failure_is_told_once() -> None:
    """What nobody heard of is handed out once; what was heard of, or is waited for, is not."""
    desk = Desk()
    unheard, heard = failed(desk, 1), failed(desk, 2)
    heard.heard = True
    assert desk.take_unheard() == [unheard]
    assert desk.take_unheard() == []


def test_a_failure_that_is_waited_for_is_kept_for_later() -> None:
    """A waiter will be told; if it leaves without, the failure is still there."""
    desk = Desk()
    waited = failed(desk, 1)
    waited.listeners = 1
    assert desk.take_unheard() == []
    waited.listeners = 0
    assert desk.take_unheard() == [waited]


def test_put_back_failures_come_again() -> None:
    """What one call cannot raise stays for the next."""
    desk = Desk()
    failed(desk, 1)
    failed(desk, 2)
    first, *others = desk.take_unheard()
    desk.put_back(others)
    assert [save.step for save in desk.take_unheard()] == [2]
    assert first.step == 1
