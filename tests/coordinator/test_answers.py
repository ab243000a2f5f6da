"""What the worker's answers mean for a save, one by one; any order of them is tried in ``test_conversation``."""

from __future__ import annotations

import anyio
import pytest

from aiockpt.coordinator.save_record import SaveRecord
from aiockpt.errors import ProtocolError, SaveBusyError, SaveCancelledError, StorageError, WorkerExitedError
from aiockpt.protocol.lifecycle import SaveState
from aiockpt.protocol.messages import Committed, EndStaging, Failed, Message, SlotFree
from aiockpt.protocol.terms import WireError
from tests.coordinator.scripted import Stage


def begun(stage: Stage) -> SaveRecord:
    """Return a save that the worker was told of, whose copy is under way."""
    record = stage.saving.save(1, {}, timeout=None, when_busy="raise", overwrite=False, metadata=None)
    stage.turn_all()
    return record


def staged(stage: Stage) -> SaveRecord:
    """Return a save of which everything is staged."""
    record = begun(stage)
    assert stage.stager.copy is not None
    stage.stager.copy.end(None)
    stage.turn_all()
    return record


def committed(save: SaveRecord) -> Message:
    return Committed(save_id=save.save_id, path="/run/step-1", nbytes=1, timings={})


def failed(save: SaveRecord) -> Message:
    return Failed(save_id=save.save_id, error=WireError(kind="storage", what="no space", errno=28))


@pytest.fixture
def stage() -> Stage:
    stage = Stage()
    stage.come_up()
    return stage


def test_the_slot_is_held_until_the_outcome(stage: Stage) -> None:
    """A retry would read the arena again: whatever the worker says, the slot is not free before."""
    save = staged(stage)
    stage.coordinator.worker_says(SlotFree(save_id=save.save_id), [])
    assert stage.desk.holder is save
    stage.coordinator.worker_says(committed(save), [])
    assert save.outcome.result() is not None
    assert stage.desk.holder is None


def test_the_slot_is_free_when_a_commit_is_told(stage: Stage) -> None:
    """Who awaits a save and then saves with ``when_busy="raise"`` is not refused."""
    save = staged(stage)
    holders: list[object] = []
    save.outcome.add_done_callback(lambda _: holders.append(stage.desk.holder))
    stage.coordinator.worker_says(committed(save), [])
    assert holders == [None]
    stage.coordinator.worker_says(SlotFree(save_id=save.save_id), [])
    assert stage.saves.tally.counts["dropped_answers"] == 0
    stage.coordinator.worker_says(committed(save), [])
    assert stage.saves.tally.counts["dropped_answers"] == 1


def test_who_has_the_slot_is_named(stage: Stage) -> None:
    """The step of a save, or prepare."""
    save = begun(stage)
    with pytest.raises(SaveBusyError, match="the save of step 1 is not finished"):
        stage.saving.save(2, {}, timeout=None, when_busy="raise", overwrite=False, metadata=None)
    other = Stage()
    assert other.desk.take_slot(object())
    with pytest.raises(SaveBusyError, match=r"prepare\(\) is not finished"):
        other.saving.save(2, {}, timeout=None, when_busy="raise", overwrite=False, metadata=None)
    assert stage.desk.holder is save


def test_a_commit_of_what_was_not_staged_is_no_answer(stage: Stage) -> None:
    """Nobody said that its bytes are the snapshot: the worker is replaced, and the save goes on."""
    save = begun(stage)
    with pytest.raises(ProtocolError, match="Committed of a save that is staging") as caught:
        stage.coordinator.worker_says(committed(save), [])
    assert caught.value.why
    assert caught.value.next
    assert not save.is_final


def test_an_answer_about_a_save_that_the_worker_does_not_know(stage: Stage) -> None:
    """It cannot have an outcome yet."""
    record = stage.saving.save(1, {}, timeout=None, when_busy="raise", overwrite=False, metadata=None)
    assert record.state is SaveState.PLANNED
    for answer in (committed(record), failed(record)):
        with pytest.raises(ProtocolError, match="planned"):
            stage.coordinator.worker_says(answer, [])
    assert not record.is_final


def test_a_failure_is_not_silenced_by_a_late_cancel(stage: Stage) -> None:
    """Who cancels a save that has failed already does not know of it: the next save tells."""
    save = staged(stage)
    stage.coordinator.worker_says(failed(save), [])
    stage.coordinator.worker_says(SlotFree(save_id=save.save_id), [])
    stage.saves.cancel(save)
    with pytest.raises(StorageError, match="no space"):
        stage.saving.save(2, {}, timeout=None, when_busy="raise", overwrite=False, metadata=None)


def test_a_cancelled_save_is_told_to_nobody(stage: Stage) -> None:
    """Who cancels knows."""
    save = begun(stage)
    stage.saves.cancel(save)
    cancelled = Failed(save_id=save.save_id, error=WireError(kind="cancelled", what="cancelled"))
    stage.coordinator.worker_says(cancelled, [])
    assert isinstance(save.failure, SaveCancelledError)
    assert stage.desk.take_unheard() == []


def test_staged_is_told_when_the_worker_knows(stage: Stage) -> None:
    """A trainer that dies right behind ``wait_staged()`` leaves a checkpoint."""
    save = begun(stage)
    assert stage.stager.copy is not None
    stage.stager.copy.end(None)
    assert not save.staged.done()
    stage.turn_all()
    assert save.staged.done()
    assert stage.worker is not None
    assert any(isinstance(frame, EndStaging) for frame in stage.worker.told(save.save_id))


def test_staged_waits_for_no_worker_that_is_not_there(stage: Stage) -> None:
    """The state may be written to: the snapshot is in the arena."""
    anyio.run(stage.coordinator.worker_down, WorkerExitedError("the worker died"))
    stage.worker = None
    assert staged(stage).staged.result(0) is None


def test_a_copy_that_ended_before_it_was_stopped_is_staged(stage: Stage) -> None:
    """Cancelled meanwhile: what the worker makes of it does not concern who waits to write to the state."""
    save = begun(stage)
    stage.saves.cancel(save)
    assert stage.stager.copy is not None
    stage.stager.copy.cancelled = None
    stage.stager.copy.end(None)
    stage.turn_all()
    assert save.staged.result(0) is None


def test_handed_over_is_what_a_living_worker_has(stage: Stage) -> None:
    """Not while there is none, and again not when it died: an exit of the interpreter waits for the next one."""
    anyio.run(stage.coordinator.worker_down, WorkerExitedError("the worker died"))
    stage.worker = None
    save = staged(stage)
    assert not save.wait_handed_over(0)
    stage.come_up()
    assert save.wait_handed_over(0)
    anyio.run(stage.coordinator.worker_down, WorkerExitedError("the worker died"))
    assert not save.wait_handed_over(0)
