"""A rank among others in a restore, whose votes are scripted: what it does when, and what of their failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aiockpt.errors import (
    CheckpointCorruptError,
    NoUsableCheckpointError,
    PeerFailedError,
    RestoreError,
    StateMismatchError,
)
from aiockpt.restoring.apply import MIXED
from aiockpt.restoring.voting import ALONE
from aiockpt.storage.readers import open_checkpoint
from aiockpt.storage.seen import Seen
from tests.restoring.restoring import fingerprint, restore
from tests.restoring.writing import write_step


def state(x: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((5, 7), x)}, "epoch": int(x)}


class Script:
    """Votes whose outcomes were written before; what this rank says, and sees at that moment, is kept.

    Args:
        live: The state that is restored.
        seen: By round: what rank 0 has opened; None where this rank leads.
        fails: By call, ``go 1``: what another rank has met.
    """

    is_shared = True

    def __init__(
        self,
        live: dict[str, Any],
        *,
        seen: list[Seen | None] | None = None,
        fails: dict[str, BaseException] | None = None,
    ) -> None:
        self.leads = seen is None
        self.calls: list[str] = []
        self.own: list[BaseException] = []
        self.values: list[float] = []
        """Of the live tensor, at each call."""
        self.over = False
        self._live = live
        self._seen = seen or []
        self._fails = fails or {}
        self._round = 0

    def propose(self, seen: Seen | None, error: BaseException | None) -> Seen | None:
        self._round += 1
        self._call("propose", error)
        return seen if self.leads else self._seen[self._round - 1]

    def go(self, error: BaseException | None) -> None:
        self._call("go", error)

    def done(self, error: BaseException | None) -> None:
        self._call("done", error)

    def is_over(self) -> bool:
        return self.over

    def _call(self, name: str, error: BaseException | None) -> None:
        self.calls.append(f"{name} {self._round}")
        self.values.append(float(self._live["model"]["w"][0, 0]))
        if error is not None:
            self.own.append(error)
        failure = self._fails.get(self.calls[-1], error)
        if failure is not None:
            raise failure


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_step(tmp_path, 1, state(1.0))
    write_step(tmp_path, 2, state(2.0))
    return tmp_path


def seen_at(run: Path, step: int) -> Seen:
    with open_checkpoint(str(run / f"step-{step}")) as checkpoint:
        head = checkpoint.manifest.head
        return Seen(head.step, head.save_id, checkpoint.manifest_nbytes, checkpoint.manifest_sum)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


FILE = "model/model-00001-of-00001.safetensors"


def test_nothing_live_changes_before_all_go(run: Path) -> None:
    live = state(0.0)
    votes = Script(live)
    outcome = restore(run, live, voting=votes)
    assert outcome is not None
    assert votes.calls == ["propose 1", "go 1", "done 1"]
    assert votes.values == [0.0, 0.0, 2.0]
    assert fingerprint(live) == fingerprint(state(2.0))


def test_who_follows_takes_what_is_proposed(run: Path) -> None:
    """And lists nothing: here the newest is not what rank 0 has opened."""
    live = state(0.0)
    votes = Script(live, seen=[seen_at(run, 1)])
    outcome = restore(run, live, voting=votes)
    assert outcome is not None
    assert outcome.step == 1
    assert votes.calls == ["propose 1", "go 1", "done 1"]


@pytest.mark.parametrize("leads", [True, False])
def test_a_misfit_elsewhere_changes_nothing_here(leads: bool, run: Path) -> None:
    live = state(0.0)
    error = StateMismatchError("they do not fit", next="Nothing live was changed: look")
    votes = Script(live, seen=None if leads else [seen_at(run, 2)], fails={"go 1": error})
    with pytest.raises(StateMismatchError) as caught:
        restore(run, live, voting=votes)
    assert fingerprint(live) == fingerprint(state(0.0))
    assert MIXED not in str(caught.value)
    assert "Nothing live was changed" in caught.value.next


@pytest.mark.parametrize("leads", [True, False])
def test_damage_elsewhere_sends_this_rank_to_the_older_step_too(
    leads: bool, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live = state(0.0)
    bad = CheckpointCorruptError("a block is bad (rank 3 on host h)", why="flipped", step=2)
    votes = Script(live, seen=None if leads else [seen_at(run, 2), seen_at(run, 1)], fails={"done 1": bad})
    handed_over: list[int] = []
    outcome = restore(run, live, voting=votes, on_bad=lambda committed, error: handed_over.append(committed.step))
    assert outcome is not None
    assert (outcome.step, outcome.skipped) == (1, {2: "a block is bad (rank 3 on host h): flipped"})
    assert votes.calls == ["propose 1", "go 1", "done 1", "propose 2", "go 2", "done 2"]
    assert "step 2 is passed over" in caplog.text
    assert handed_over == ([2] if leads else [])
    assert fingerprint(live) == fingerprint(state(1.0))


@pytest.mark.parametrize("leads", [True, False])
def test_what_fails_behind_a_bad_step_leaves_a_mixture(leads: bool, run: Path) -> None:
    """Also for a rank whose own part was whole."""
    live = state(0.0)
    fails: dict[str, BaseException] = {
        "done 1": CheckpointCorruptError("bad", step=2),
        "go 2": StateMismatchError("they do not fit", next="Nothing live was changed: look"),
    }
    votes = Script(live, seen=None if leads else [seen_at(run, 2), seen_at(run, 1)], fails=fails)
    with pytest.raises(StateMismatchError) as caught:
        restore(run, live, voting=votes)
    assert MIXED in str(caught.value)
    assert "Nothing live was changed" not in caught.value.next


def test_a_rank_that_changed_nothing_yet_says_mixed_once_others_read(run: Path) -> None:
    """They hold parts of the same state."""
    live = state(0.0)
    votes = Script(live, fails={"done 1": PeerFailedError("it failed", rank=3)})
    votes.over = True
    with pytest.raises(PeerFailedError) as caught:
        restore(run, live, voting=votes)
    assert [type(error) for error in votes.own] == [RestoreError]
    assert fingerprint(live) == fingerprint(state(0.0))
    assert MIXED in str(caught.value)


def test_what_rank_0_cannot_open_it_says_before_it_goes_on(run: Path) -> None:
    (run / "step-2" / FILE).unlink()
    live = state(0.0)
    votes = Script(live)
    outcome = restore(run, live, voting=votes)
    assert outcome is not None
    assert outcome.step == 1
    assert votes.calls == ["propose 1", "propose 2", "go 2", "done 2"]
    assert [type(error) for error in votes.own] == [CheckpointCorruptError]


def test_none_left_is_the_same_on_a_rank_that_follows(run: Path) -> None:
    live = state(0.0)
    bad = CheckpointCorruptError("bad", step=2)
    with pytest.raises(NoUsableCheckpointError) as caught:
        restore(run, live, voting=Script(live, seen=[None, None], fails={"propose 1": bad}))
    assert list(caught.value.skipped or {}) == [2]
    assert restore(run, live, voting=Script(live, seen=[None])) is None


def test_its_own_bad_block_is_said_and_raised(run: Path) -> None:
    flip(run / "step-2" / FILE)
    live = state(0.0)
    votes = Script(live, seen=[seen_at(run, 2)])
    with pytest.raises(CheckpointCorruptError) as caught:
        restore(run, live, voting=votes, step=2)
    assert votes.own == [caught.value]
    assert votes.calls == ["propose 1", "go 1", "done 1"]


def test_alone_nobody_is_asked(run: Path) -> None:
    """The same calls, which answer at once."""
    seen = seen_at(run, 2)
    assert ALONE.propose(seen, None) is seen
    ALONE.go(None)
    ALONE.done(None)
    for call in (ALONE.go, ALONE.done, lambda error: ALONE.propose(None, error)):
        with pytest.raises(KeyError):
            call(KeyError("x"))
    assert (ALONE.leads, ALONE.is_shared, ALONE.is_over()) == (True, False, False)
