"""Restores of several ranks, each in a thread, that vote over a real room: one outcome for all of them."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from aiockpt.coordinator.votes import Votes
from aiockpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    ConfigError,
    NoUsableCheckpointError,
    PeerFailedError,
    RestoreError,
    StateMismatchError,
    StepNotFoundError,
    StorageError,
)
from aiockpt.restoring.apply import MIXED
from aiockpt.restoring.attempt import Attempt
from aiockpt.restoring.run import RestoreOutcome
from aiockpt.storage import seen
from aiockpt.storage.run_directory import Committed
from tests.coordinator.meeting_hub import ARRIVAL_TIMEOUT, MeetingHub
from tests.restoring.ranked import by_dim, write_ranks
from tests.restoring.restoring import fingerprint, restore
from tests.support import PATIENCE_SECONDS

WORLD = 3


def whole(x: float) -> dict[str, Any]:
    return {"model": {"a": torch.full((6, 4), x), "b": torch.full((9,), x)}, "epoch": int(x)}


def states_of(x: float) -> list[dict[str, Any]]:
    return [whole(x) | {"own": rank} for rank in range(WORLD)]


class Ranks:
    """A job that restores: what each rank sees as the run, has as state, and was told."""

    def __init__(self, run: Path, hub: MeetingHub, pool: ThreadPoolExecutor) -> None:
        self.runs = [run] * WORLD
        self.hub = hub
        self.live = [state | {"own": -1} for state in states_of(0.0)]
        self.stops = [threading.Event() for _ in range(WORLD)]
        self.on_block: list[Callable[[], bool]] = [stop.is_set for stop in self.stops]
        """By rank: asked before each block, whether it is to stop."""
        self.bad: list[int] = []
        """Steps that rank 0 was to rename."""
        self._pool = pool
        self._calls = [0] * WORLD

    def see_for_itself(self, rank: int) -> Path:
        """Give a rank a copy of the run, which then is damaged or late for it alone."""
        copy = self.runs[0].parent / f"as-seen-by-{rank}"
        shutil.copytree(self.runs[0], copy)
        self.runs[rank] = copy
        return copy

    def begin(self, rank: int, **options: Any) -> Any:
        self._calls[rank] += 1
        votes = Votes(
            self.hub.meetings[rank],
            number=self._calls[rank],
            claim=f"restore(step={options.get('step')})",
            stop=self.stops[rank],
        )
        return self._pool.submit(
            restore,
            self.runs[rank],
            self.live[rank],
            rank=rank,
            voting=votes,
            on_bad=self._rename,
            should_stop=lambda: self.on_block[rank](),
            **options,
        )

    def restore(self, **options: Any) -> list[RestoreOutcome | None]:
        """Restore on all ranks; all succeed."""
        return [future.result(PATIENCE_SECONDS) for future in [self.begin(rank, **options) for rank in range(WORLD)]]

    def fail(self, **options: Any) -> list[CheckpointError]:
        """Restore on all ranks; all fail."""
        errors = [
            future.exception(PATIENCE_SECONDS) for future in [self.begin(rank, **options) for rank in range(WORLD)]
        ]
        assert all(isinstance(error, CheckpointError) for error in errors), errors
        return errors  # type: ignore[return-value]

    def _rename(self, committed: Committed, error: CheckpointCorruptError) -> None:
        self.bad.append(committed.step)
        assert error.step == committed.step
        os.rename(committed.path, f"{self.runs[0]}/.bad-step-{committed.step}.{committed.save_id}")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Ranks]:
    """Two good checkpoints of three ranks, step 2 newer; nobody has patience with file systems."""
    run = tmp_path / "run"
    write_ranks(run, states_of(1.0), by_dim(0, WORLD), step=1, own=["own"])
    write_ranks(run, states_of(2.0), by_dim(0, WORLD), step=2, own=["own"])
    with pytest.MonkeyPatch.context() as patch, MeetingHub(WORLD) as hub, ThreadPoolExecutor(WORLD) as pool:
        patch.setattr(seen, "PATIENCE_SECONDS", 0.0)
        yield Ranks(run, hub, pool)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def part_of(run: Path, step: int, rank: int) -> Path:
    return run / f"step-{step}" / "model" / f"model-0000{rank + 1}-of-00003.safetensors"


def assert_restored(job: Ranks, outcomes: list[RestoreOutcome | None], step: int) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome is not None
        assert outcome.step == step
        assert fingerprint(job.live[rank]) == fingerprint(states_of(float(step))[rank])


def assert_untouched(job: Ranks) -> None:
    for state in job.live:
        assert fingerprint(state) == fingerprint(whole(0.0) | {"own": -1})


def assert_all_named(errors: list[CheckpointError], rank: int) -> None:
    """It is said on every rank, on which rank and host it was met."""
    for error in errors:
        assert f"rank {rank} on host {os.uname().nodename}" in error.what


def assert_mixed(errors: list[CheckpointError]) -> None:
    for error in errors:
        assert MIXED in error.why
        assert "Nothing live was changed" not in error.next


# ---- all is well


def test_all_restore_the_newest_and_each_its_own(job: Ranks) -> None:
    assert_restored(job, job.restore(), 2)
    assert [state["own"] for state in job.live] == [0, 1, 2]


def test_an_explicit_step(job: Ranks) -> None:
    assert_restored(job, job.restore(step=1), 1)


def test_one_after_another(job: Ranks) -> None:
    assert_restored(job, job.restore(step=1), 1)
    assert_restored(job, job.restore(), 2)


def test_a_run_without_checkpoints_is_none_on_all(job: Ranks) -> None:
    for step in (1, 2):
        shutil.rmtree(job.runs[0] / f"step-{step}")
    assert job.restore() == [None] * WORLD


def test_nobody_but_rank_0_lists_the_run(job: Ranks) -> None:
    """A newer one that rank 2 sees is not rank 0's."""
    write_ranks(job.see_for_itself(2), states_of(3.0), by_dim(0, WORLD), step=3, own=["own"])
    assert_restored(job, job.restore(), 2)


# ---- damage


def damage_at_rank_0(job: Ranks) -> None:
    part_of(job.runs[0], 2, 1).unlink()


def damage_of_a_head(job: Ranks) -> None:
    (job.runs[0] / "step-2" / "manifest.json").write_bytes(b"{}")


def damage_for_one(job: Ranks) -> None:
    flip(part_of(job.see_for_itself(2), 2, 0))


def damage_for_all(job: Ranks) -> None:
    flip(part_of(job.runs[0], 2, 2))


DAMAGES = [damage_at_rank_0, damage_of_a_head, damage_for_one, damage_for_all]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_proven_bad_is_passed_over_by_all(
    damage: Callable[[Ranks], None], job: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever saw it: with a warning on every rank, and rank 0 alone renames it."""
    damage(job)
    outcomes = job.restore()
    assert_restored(job, outcomes, 1)
    assert len({outcome.skipped[2] for outcome in outcomes if outcome is not None}) == 1
    assert caplog.text.count("step 2 is passed over") == WORLD
    assert job.bad == ([] if damage is damage_of_a_head else [2])
    assert_restored(job, job.restore(), 1)


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_explicit_step_that_is_bad_is_an_error_on_all(damage: Callable[[Ranks], None], job: Ranks) -> None:
    """Of one class, with file and checksums where they are known."""
    damage(job)
    errors = job.fail(step=2)
    assert {type(error) for error in errors} == {CheckpointCorruptError}
    assert len({(error.step, error.file, error.offset, error.expected) for error in errors}) == 1  # type: ignore[attr-defined]
    assert errors[0].step == 2  # type: ignore[attr-defined]
    assert not job.bad
    if damage in (damage_for_one, damage_for_all):
        assert_mixed(errors)
    else:
        assert_untouched(job)


def test_if_none_is_good_that_is_an_error_on_all(job: Ranks) -> None:
    flip(part_of(job.runs[0], 2, 2))
    part_of(job.runs[0], 1, 0).unlink()
    errors = job.fail()
    assert {type(error) for error in errors} == {NoUsableCheckpointError}
    assert len({str(error.skipped) for error in errors}) == 1  # type: ignore[attr-defined]
    assert_mixed(errors)


def test_a_rename_that_fails_on_rank_0_is_an_error_on_all(job: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for the next proposal."""

    def refuse(committed: Committed, error: CheckpointCorruptError) -> None:
        raise StorageError("a bad checkpoint was not renamed", errno=30, path=committed.path)

    monkeypatch.setattr(job, "_rename", refuse)
    damage_at_rank_0(job)
    errors = job.fail()
    assert {(type(error), error.errno) for error in errors} == {(StorageError, 30)}  # type: ignore[attr-defined]
    assert_all_named(errors, 0)


# ---- what proves nothing


def lose_the_step(run: Path) -> None:
    shutil.rmtree(run / "step-2")


def lose_a_file(run: Path) -> None:
    part_of(run, 2, 0).unlink()


def cut_a_file(run: Path) -> None:
    with part_of(run, 2, 0).open("r+b") as file:
        file.truncate(5000)


def see_another_manifest(run: Path) -> None:
    shutil.rmtree(run / "step-2")
    write_ranks(run, states_of(2.0), by_dim(0, WORLD), step=2, own=["own"])


@pytest.mark.parametrize("change", [lose_the_step, lose_a_file, cut_a_file, see_another_manifest])
def test_a_rank_that_does_not_see_it_is_an_error_on_all(change: Callable[[Path], None], job: Ranks) -> None:
    """Never an older step, and nothing live is changed on any rank."""
    change(job.see_for_itself(1))
    errors = job.fail()
    assert {type(error) for error in errors} == {StorageError}
    assert_all_named(errors, 1)
    assert "shared file system" in errors[2].next
    assert not job.bad
    assert_untouched(job)


def test_a_rank_that_cannot_read_it_is_an_error_on_all(job: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = job.see_for_itself(1)
    read = os.preadv

    def broken(fd: int, buffers: Any, offset: int) -> int:
        if offset and os.readlink(f"/proc/self/fd/{fd}").startswith(str(copy)):
            raise OSError(5, "EIO")
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", broken)
    errors = job.fail()
    assert {(type(error), error.errno) for error in errors} == {(StorageError, 5)}  # type: ignore[attr-defined]
    assert_all_named(errors, 1)
    assert_mixed(errors)
    assert not job.bad


# ---- what does not fit


def test_a_live_state_that_does_not_fit_on_one_rank_changes_nothing_anywhere(job: Ranks) -> None:
    job.live[2]["model"]["a"] = torch.zeros(5, 4)
    before = [fingerprint(state) for state in job.live]
    errors = job.fail()
    assert {type(error) for error in errors} == {StateMismatchError}
    assert_all_named(errors, 2)
    assert len(errors[2].mismatched) == 1  # type: ignore[attr-defined]
    assert "Nothing live was changed" in errors[0].next
    assert [fingerprint(state) for state in job.live] == before


def test_a_step_that_is_not_there_is_said_by_all(job: Ranks) -> None:
    errors = job.fail(step=7)
    assert {(type(error), error.step) for error in errors} == {(StepNotFoundError, 7)}  # type: ignore[attr-defined]


def test_different_arguments_are_told(job: Ranks) -> None:
    calls = [job.begin(0, step=1), job.begin(1), job.begin(2)]
    for call in calls:
        with pytest.raises(ConfigError, match="do not agree") as caught:
            call.result(PATIENCE_SECONDS)
        assert "called restore(step=1)" in str(caught.value)
        assert "called restore(step=None)" in str(caught.value)
    assert_untouched(job)


# ---- ranks that are lost


def test_a_rank_that_never_comes_is_named(job: Ranks) -> None:
    calls = [job.begin(0), job.begin(2)]
    job.hub.wait_said(WORLD + 2)
    job.hub.pass_time(ARRIVAL_TIMEOUT)
    for call in calls:
        with pytest.raises(PeerFailedError, match="rank 1 did not come") as caught:
            call.result(PATIENCE_SECONDS)
        assert caught.value.rank == 1
    late = job.begin(1)
    with pytest.raises(PeerFailedError, match="rank 1 did not come"):
        late.result(PATIENCE_SECONDS)
    assert_restored(job, job.restore(), 2)


def test_a_rank_that_dies_while_it_reads_fails_all(job: Ranks) -> None:
    def die() -> bool:
        job.hub.give_up(1, "its trainer died")
        return False

    job.on_block[1] = die
    errors = job.fail()
    assert {(type(error), error.rank) for error in errors} == {(PeerFailedError, 1)}  # type: ignore[attr-defined]
    assert "its trainer died" in errors[0].why
    assert_mixed(errors)


@pytest.mark.parametrize("happens", ["replace", "lose"])
def test_workers_that_die_meanwhile_change_nothing(happens: str, job: Ranks) -> None:
    """The hub's, or another one's: what is open is said again."""
    done = threading.Event()

    def happen() -> bool:
        if not done.is_set():
            done.set()
            if happens == "replace":
                job.hub.replace()
            else:
                job.hub.lose(1)
                job.hub.join(1)
        return False

    job.on_block[1] = happen
    assert_restored(job, job.restore(), 2)
    assert done.is_set()


def test_a_bug_on_one_rank_is_an_error_on_all(job: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = Attempt.prepare

    def broken(self: Attempt, checkpoint: Any) -> Any:
        if self._rank == 2:
            raise ZeroDivisionError("oh")
        return prepare(self, checkpoint)

    monkeypatch.setattr(Attempt, "prepare", broken)
    calls = [job.begin(rank) for rank in range(WORLD)]
    with pytest.raises(ZeroDivisionError):
        calls[2].result(PATIENCE_SECONDS)
    for call in calls[:2]:
        with pytest.raises(PeerFailedError, match="ZeroDivisionError: oh") as caught:
            call.result(PATIENCE_SECONDS)
        assert (caught.value.rank, caught.value.phase) == (2, "match")
    assert_untouched(job)


# ---- cancelling


def test_cancelling_before_all_have_come_ends_it_on_all(job: Ranks) -> None:
    calls = [job.begin(0), job.begin(1)]
    job.stops[1].set()
    with pytest.raises(RestoreError, match="cancelled"):
        calls[1].result(PATIENCE_SECONDS)
    late = job.begin(2)
    for call in (calls[0], late):
        with pytest.raises(PeerFailedError, match="cancelled on rank 1") as caught:
            call.result(PATIENCE_SECONDS)
        assert (caught.value.rank, caught.value.phase) == (1, "")
    assert_untouched(job)


def test_cancelling_while_reading_stops_the_others_at_their_next_block(job: Ranks) -> None:
    is_over = threading.Event()

    def wait_for_the_others() -> bool:
        while not job.hub.meetings[0].has_ended("restore 1, read 1"):
            assert not is_over.wait(0.001)
        return False

    def cancel() -> bool:
        job.stops[2].set()
        return True

    job.on_block[0] = wait_for_the_others
    job.on_block[2] = cancel
    calls = [job.begin(rank) for rank in range(WORLD)]
    with pytest.raises(RestoreError) as own:
        calls[2].result(PATIENCE_SECONDS)
    assert MIXED in own.value.why
    for call in calls[:2]:
        with pytest.raises(PeerFailedError, match="cancelled") as caught:
            call.result(PATIENCE_SECONDS)
        assert caught.value.rank == 2
        assert MIXED in caught.value.why
    assert not job.live[0]["model"]["a"].any()


def test_a_call_that_failed_before_its_first_vote_is_told(job: Ranks) -> None:
    Votes(job.hub.meetings[1], number=1, claim="restore()", stop=threading.Event()).excuse(
        ConfigError("include was refused", argument="include")
    )
    for rank in (0, 2):
        with pytest.raises(ConfigError, match="include was refused"):
            job.begin(rank).result(PATIENCE_SECONDS)
