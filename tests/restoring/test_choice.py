"""Which checkpoint is taken, and what ends a restore early."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from aiockpt.errors import ConfigError, RestoreError, StepNotFoundError
from aiockpt.restoring import candidates as candidates_module
from aiockpt.restoring.apply import MIXED
from aiockpt.restoring.load import load_checkpoint
from aiockpt.storage.commit import remove_tree, retire
from aiockpt.storage.faults import FaultPoint, Faults
from aiockpt.storage.readers import open_checkpoint
from tests.restoring.restoring import restore
from tests.restoring.writing import rewrite_manifest, write_step


def value(x: int) -> dict[str, Any]:
    return {"x": x, "t": torch.full((3,), float(x))}


def restored(path: Path, **options: Any) -> int:
    live = value(-1)
    outcome = restore(path, live, **options)
    assert outcome is not None
    assert live["t"].tolist() == [live["x"]] * 3
    assert outcome.step == live["x"]
    return int(outcome.step)


def test_newest_is_by_term_and_ordinal(tmp_path: Path):
    """Not by step: after going back, a lower step is newer."""
    write_step(tmp_path, 100, value(100), term=1, ordinal=8)
    write_step(tmp_path, 50, value(50), term=1, ordinal=9)
    assert restored(tmp_path) == 50
    write_step(tmp_path, 10, value(10), term=2, ordinal=3)
    assert restored(tmp_path) == 10


def test_an_older_step_is_restored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """That names the newer ones."""
    for step in (1, 2, 3):
        write_step(tmp_path, step, value(step))
    assert restored(tmp_path, step=1) == 1
    assert "newer ones stand: 3, 2" in caplog.text
    caplog.clear()
    assert restored(tmp_path, step=3) == 3
    assert not caplog.records


def test_a_step_directory_is_a_path_too(tmp_path: Path):
    """In the run, or copied somewhere else under another name."""
    write_step(tmp_path / "run", 1, value(1))
    write_step(tmp_path / "run", 2, value(2))
    assert restored(tmp_path / "run" / "step-1") == 1
    assert restored(tmp_path / "run" / "step-1", step=1) == 1
    shutil.copytree(tmp_path / "run" / "step-1", tmp_path / "mine")
    assert restored(tmp_path / "mine") == 1
    with pytest.raises(ConfigError, match="it is step 1, and step=2 was asked for") as caught:
        restore(tmp_path / "run" / "step-1", value(0), step=2)
    assert caught.value.argument == "step"


def test_nothing_yet_is_none(tmp_path: Path):
    """An empty run is no error for a restore; there is nothing to load."""
    assert restore(tmp_path, value(0)) is None
    with pytest.raises(StepNotFoundError, match="no checkpoint yet"):
        load_checkpoint(tmp_path)


def test_a_step_that_is_not_there(tmp_path: Path):
    """The error names those that are."""
    write_step(tmp_path, 1, value(1))
    write_step(tmp_path, 7, value(7))
    with pytest.raises(StepNotFoundError, match="newest first, it has: 7, 1") as caught:
        restore(tmp_path, value(0), step=3)
    assert (caught.value.step, caught.value.path) == (3, str(tmp_path))
    with pytest.raises(StepNotFoundError) as caught:
        restore(tmp_path / "step-3", value(0))
    assert caught.value.step == 3


@pytest.mark.parametrize("step", [-1, True, 1.5, "1"])
def test_what_is_no_step_is_refused(step: Any, tmp_path: Path):
    """Before anything is opened."""
    with pytest.raises(ConfigError, match="step was refused") as caught:
        restore(tmp_path, value(0), step=step)
    assert caught.value.argument == "step"


def test_what_is_no_run_is_refused(tmp_path: Path):
    """Missing, a file, or another program's directory."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("x")
    for name in ("missing", "file", "foreign"):
        with pytest.raises(ConfigError) as caught:
            restore(tmp_path / name, value(0))
        assert str(tmp_path / name) in str(caught.value)
        assert caught.value.next


@pytest.mark.parametrize("path", [5, None, b"x", "", "a\0b"])
def test_what_is_no_path_is_refused(path: Any):
    """With the argument's name."""
    for call in (lambda: restore(path, value(0)), lambda: load_checkpoint(path)):
        with pytest.raises(ConfigError, match="path was refused") as caught:
            call()
        assert caught.value.argument == "path"


def test_a_newer_format_is_no_damage(tmp_path: Path):
    """It is not passed over for an older step."""
    write_step(tmp_path, 1, value(1))
    step = write_step(tmp_path, 2, value(2))
    rewrite_manifest(step, head={"format": 99})
    with pytest.raises(ConfigError, match="upgrade aiockpt"):
        restore(tmp_path, value(0))


def test_a_checkpoint_that_is_removed_meanwhile_is_chosen_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Retention removes only what is no longer the newest, so another look finds a newer one."""
    write_step(tmp_path, 1, value(1))

    def removed_first(path: str, **options: Any) -> Any:
        monkeypatch.setattr(candidates_module, "open_checkpoint", open_checkpoint)
        write_step(tmp_path, 2, value(2))
        shutil.rmtree(tmp_path / "step-1")
        return open_checkpoint(path, **options)

    monkeypatch.setattr(candidates_module, "open_checkpoint", removed_first)
    assert restored(tmp_path) == 2


def test_a_run_that_is_never_still_ends_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Bounded, and said."""
    write_step(tmp_path, 1, value(1))

    def gone(path: str, **options: Any) -> Any:
        raise StepNotFoundError("gone", path=path)

    monkeypatch.setattr(candidates_module, "open_checkpoint", gone)
    with pytest.raises(StepNotFoundError, match="stayed long enough"):
        restore(tmp_path, value(0))
    with pytest.raises(StepNotFoundError, match="gone"):
        restore(tmp_path, value(0), step=1)


def test_readers_beside_a_removal_get_whole_checkpoints(tmp_path: Path):
    """A writer commits and prunes as fast as it can; no restore fails or mixes steps."""
    write_step(tmp_path, 0, value(0))
    stop = threading.Event()
    trouble: list[BaseException] = []

    def write() -> None:
        run_fd = os.open(tmp_path, os.O_RDONLY)
        try:
            step = 0
            while not stop.is_set():
                step += 1
                unseen = write_step(tmp_path / ".new", step, value(step), ordinal=step)
                os.rename(unseen, tmp_path / f"step-{step}")
                trash = retire(run_fd, f"step-{step - 1}")
                if trash is not None:
                    remove_tree(run_fd, trash)
        except BaseException as exc:  # noqa: BLE001  # shown by the test
            trouble.append(exc)
        finally:
            os.close(run_fd)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {restored(tmp_path) for _ in range(60)}
    finally:
        stop.set()
        writer.join(30)
    assert not trouble
    assert len(seen) > 1


def test_a_restore_is_cancelled_between_blocks(tmp_path: Path):
    """The state is then mixed, if a block was copied; before that it is as it was."""
    write_step(tmp_path, 1, {"a": {"t": torch.ones(2)}, "b": {"t": torch.ones(2)}})
    asked = 0

    def second_time() -> bool:
        nonlocal asked
        asked += 1
        return asked == 2

    live = {"a": {"t": torch.zeros(2)}, "b": {"t": torch.zeros(2)}}
    with pytest.raises(RestoreError, match="cancelled") as caught:
        restore(tmp_path, live, should_stop=lambda: True)
    assert MIXED not in str(caught.value)
    assert live["a"]["t"].tolist() == live["b"]["t"].tolist() == [0, 0]
    with pytest.raises(RestoreError, match="cancelled") as caught:
        restore(tmp_path, live, should_stop=second_time, threads=1)
    assert MIXED in str(caught.value)
    assert sorted([live["a"]["t"].tolist(), live["b"]["t"].tolist()]) == [[0, 0], [1, 1]]


def test_the_fault_point_is_passed_before_anything_changes(tmp_path: Path):
    """A process that is killed there has changed nothing."""
    write_step(tmp_path, 1, value(1))
    passed: list[FaultPoint] = []
    live = value(0)

    class Watching(Faults):
        def at(self, point: FaultPoint, path: str = "") -> None:
            passed.append(point)
            assert live["t"].tolist() == [0, 0, 0]

    restore(tmp_path, live, faults=Watching())
    assert FaultPoint.TRAINER_RESTORING in passed
    assert passed[-1] is FaultPoint.TRAINER_READ


def test_descriptors_and_threads_are_given_back(tmp_path: Path):
    """After success and after failure."""
    write_step(tmp_path, 1, value(1))
    restored(tmp_path)

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    before = held()
    for _ in range(5):
        restored(tmp_path)
        load_checkpoint(tmp_path, mmap=True)
        with pytest.raises(Exception, match="does not fit"):
            restore(tmp_path, {"y": 1})
        with pytest.raises(RestoreError):
            restore(tmp_path, value(0), should_stop=lambda: True)
    assert held() == before
