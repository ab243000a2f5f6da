"""The scan of a run: order, damage, and its time at 10,000 steps."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path

import pytest

from aiockpt.errors import ConfigError, StorageError
from aiockpt.format.manifest import FORMAT_VERSION
from aiockpt.storage.claim import RunClaim
from aiockpt.storage.run_directory import Committed, find_committed, highest_term, scan
from tests.storage.making import opened, save_id, write_head


def test_newest_first(tmp_path: Path) -> None:
    """By term, then ordinal; never by step. Everything else in the directory is passed by."""
    write_head(tmp_path, 300, term=1, ordinal=3)
    write_head(tmp_path, 100, term=2, ordinal=4)
    write_head(tmp_path, 200, term=1, ordinal=9)
    write_head(tmp_path, 50, term=2, ordinal=5, number=7)
    for name in (".step-400.ab.0", ".old.step-1.ab", ".bad-step-2.ab", ".trash.x", "step-x", "notes"):
        (tmp_path / name).mkdir()
    found = scan(str(tmp_path))
    assert [known.step for known in found.checkpoints] == [50, 100, 200, 300]
    assert found.unreadable == []
    assert found.checkpoints[0] == Committed(50, 2, 5, save_id(7), 1 << 30, str(tmp_path / "step-50"))


def test_a_step_has_one_directory(tmp_path: Path) -> None:
    """A copy under another spelling of the number is passed by, whole or damaged: no step is listed twice."""
    write_head(tmp_path, 12, ordinal=1)
    write_head(tmp_path, 12, ordinal=9, name="step-012", number=2)
    (tmp_path / "step-0000000013").mkdir()
    found = scan(str(tmp_path))
    assert [(known.step, known.ordinal, known.path) for known in found.checkpoints] == [
        (12, 1, str(tmp_path / "step-12"))
    ]
    assert found.unreadable == []


def test_damaged_heads_are_told_apart(tmp_path: Path) -> None:
    """Each with its reason; the good ones are listed."""
    write_head(tmp_path, 1)
    write_head(tmp_path, 2, name="step-20")
    for step in (3, 4, 5, 6, 7):
        (tmp_path / f"step-{step}").mkdir()
    (tmp_path / "step-4" / "manifest.json").write_bytes(b"")
    (tmp_path / "step-5" / "manifest.json").write_bytes(b'{"head":{"format":1,"step"')
    (tmp_path / "step-6" / "manifest.json").mkdir()
    os.mkfifo(tmp_path / "step-7" / "manifest.json")
    (tmp_path / "step-8").write_text("a file")
    found = scan(str(tmp_path))
    assert [known.step for known in found.checkpoints] == [1]
    why = {bad.step: bad.why for bad in found.unreadable}
    assert list(why) == [20, 8, 7, 6, 5, 4, 3]
    assert "step 2" in why[20]
    assert why[3] == "it has no manifest.json"
    assert all(why.values())
    assert found.unreadable[0].path == str(tmp_path / "step-20")


def test_a_flipped_bit_in_a_head(tmp_path: Path) -> None:
    """No checkpoint moves up or down the list by damage: its head has a checksum."""
    write_head(tmp_path, 1, ordinal=5)
    path = tmp_path / "step-1" / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"ordinal":5', b'"ordinal":7'))
    assert scan(str(tmp_path)).checkpoints == []
    assert scan(str(tmp_path)).unreadable[0].step == 1


def test_an_errno_is_no_damage(tmp_path: Path) -> None:
    """What cannot be read must not be passed over for an older step."""
    write_head(tmp_path, 1)
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-2" / "manifest.json").symlink_to("manifest.json")
    with pytest.raises(StorageError) as caught:
        scan(str(tmp_path))
    assert caught.value.errno == errno.ELOOP
    assert caught.value.path == str(tmp_path / "step-2" / "manifest.json")


def test_a_newer_format(tmp_path: Path) -> None:
    """Passing it over would silently restore an older step."""
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "manifest.json").write_text(f'{{"head":{{"format":{FORMAT_VERSION + 1},"new":1}},"x":2}}')
    with pytest.raises(ConfigError) as caught:
        scan(str(tmp_path))
    assert "upgrade" in caught.value.next


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    """A wrong path is no empty run."""
    with pytest.raises(ConfigError):
        scan(str(tmp_path / "nothing"))


def test_a_checkpoint_that_goes_away_during_the_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left out without a word: retention of a running job does that."""
    write_head(tmp_path, 1)
    write_head(tmp_path, 2)
    real = os.open

    def remove_first(path: str, *arguments: object, **options: object) -> int:
        shutil.rmtree(tmp_path / "step-1", ignore_errors=True)
        return real(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", remove_first)
    found = scan(str(tmp_path))
    monkeypatch.undo()
    assert [known.step for known in found.checkpoints] == [2]
    assert found.unreadable == []


def test_looking_for_one(tmp_path: Path) -> None:
    """Damage is as good as nothing there: it is not this save."""
    write_head(tmp_path, 1, number=3)
    (tmp_path / "step-2").mkdir()
    fd = opened(tmp_path)
    known = find_committed(fd, str(tmp_path), 1)
    assert known is not None
    assert known.save_id == save_id(3)
    assert find_committed(fd, str(tmp_path), 2) is None
    assert find_committed(fd, str(tmp_path), 3) is None
    assert highest_term(fd) == 0
    (tmp_path / ".term-12").touch()
    (tmp_path / ".term-9").touch()
    assert highest_term(fd) == 12
    os.close(fd)


def _best_seconds(path: Path, steps: int) -> float:
    """Return how long it takes to open a warm run for writing, to the list of its checkpoints; the best of some."""
    RunClaim.take(str(path), linger_timeout=1).release()
    for step in range(steps):
        write_head(path, step, ordinal=step)
    best = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        claim = RunClaim.take(str(path), linger_timeout=1)
        best = min(best, time.perf_counter() - begin)
        claim.release()
        assert len(claim.checkpoints) == steps
    shutil.rmtree(path)  # not left for pytest, which keeps the last three
    return best


@pytest.mark.timing
def test_ten_thousand_steps(tmp_path: Path) -> None:
    """A warm run of 10,000 steps is opened in under 0.5 s."""
    assert _best_seconds(tmp_path / "run", 10_000) < 0.5


def test_a_thousand_steps(tmp_path: Path) -> None:
    """A tenth of it with ten times the slack, for a busy machine."""
    assert _best_seconds(tmp_path / "run", 1_000) < 0.5
