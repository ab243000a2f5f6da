"""Calls that are wrong: each is refused with a helpful error, loses nothing, hangs nothing, and the next save works."""

from __future__ import annotations

import math
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import aiockpt
from aiockpt import blocking
from tests.helpful import assert_helpful

pytestmark = pytest.mark.process

STATE: dict[str, Any] = {"x": torch.arange(1000), "n": 1}


class Held:
    """Holds whoever reads the state, so that another thread can come."""

    def __init__(self) -> None:
        self.is_read, self.go_on = threading.Event(), threading.Event()

    def state_dict(self) -> dict[str, int]:
        self.is_read.set()
        assert self.go_on.wait(60)
        return {"n": 1}

    def load_state_dict(self, state: dict[str, int]) -> None: ...


def from_a_second_thread(ckpt: blocking.Checkpointer) -> None:
    """Save while another thread is inside of ``save()``."""
    held = Held()
    first = threading.Thread(target=lambda: ckpt.save(1, {"held": held}).result(60))
    first.start()
    try:
        assert held.is_read.wait(60)
        ckpt.save(2, STATE)
    finally:
        held.go_on.set()
        first.join(60)
        assert 1 in ckpt.steps(), "the first save is whole"


def from_a_forked_child(call: Callable[[blocking.Checkpointer], object]) -> Callable[[blocking.Checkpointer], None]:
    """Return what makes a call in a forked child, and raises here what it raised there."""

    def fork(ckpt: blocking.Checkpointer) -> None:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                call(ckpt)
            except BaseException as exc:  # noqa: BLE001
                os.write(write, pickle.dumps(exc))
            os._exit(0)
        os.close(write)
        with open(read, "rb") as pipe:
            said = pipe.read()
        os.waitpid(pid, 0)
        if said:
            raise pickle.loads(said)

    return fork


SAVING: dict[str, tuple[Callable[[blocking.Checkpointer], object], type[BaseException], dict[str, Any]]] = {
    "a step that exists": (lambda ckpt: ckpt.save(0, STATE), aiockpt.StepExistsError, {"step": 0}),
    **{
        f"step {step!r}": (lambda ckpt, step=step: ckpt.save(step, STATE), aiockpt.ConfigError, {"argument": "step"})
        for step in (-1, 1.0, "1", None, True, 1 << 63)
    },
    **{
        f"timeout {seconds!r}": (
            lambda ckpt, seconds=seconds: ckpt.save(1, STATE, timeout=seconds),
            aiockpt.ConfigError,
            {"argument": "timeout"},
        )
        for seconds in (0, -1.0, math.nan, "1", True)
    },
    "when_busy unknown": (
        lambda ckpt: ckpt.save(1, STATE, when_busy="later"),  # type: ignore[call-overload]
        aiockpt.ConfigError,
        {"argument": "when_busy"},
    ),
    "metadata that cannot be saved": (
        lambda ckpt: ckpt.save(1, STATE, metadata={"f": len}),
        aiockpt.UnsupportedValueError,
        {"key": "metadata.f"},
    ),
    "a state without names": (lambda ckpt: ckpt.save(1, [torch.ones(1)]), aiockpt.UnsupportedValueError, {}),  # type: ignore[arg-type]
    "opened twice": (lambda ckpt: ckpt.open(), aiockpt.UsageError, {}),
    "two threads": (from_a_second_thread, aiockpt.UsageError, {}),
    "saving in a forked child": (from_a_forked_child(lambda ckpt: ckpt.save(1, STATE)), aiockpt.UsageError, {}),
    "restoring in a forked child": (from_a_forked_child(lambda ckpt: ckpt.restore(STATE)), aiockpt.UsageError, {}),
    "restoring step -1": (lambda ckpt: ckpt.restore(STATE, step=-1), aiockpt.ConfigError, {"argument": "step"}),
    "restoring a step that is missing": (
        lambda ckpt: ckpt.restore(STATE, step=7),
        aiockpt.StepNotFoundError,
        {"step": 7},
    ),
    "loading a step that is missing": (lambda ckpt: ckpt.load(7), aiockpt.StepNotFoundError, {"step": 7}),
    "verifying a step that is missing": (lambda ckpt: ckpt.verify(7), aiockpt.StepNotFoundError, {"step": 7}),
    "an include that fits nothing": (
        lambda ckpt: ckpt.restore(STATE, include="modle"),
        aiockpt.ConfigError,
        {"argument": "include"},
    ),
}


@pytest.mark.parametrize("case", SAVING)
def test_wrong_calls(case: str, tmp_path: Path) -> None:
    """Nothing was begun, what stood stands, and the slot is free."""
    call, kind, fields = SAVING[case]
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.save(0, STATE).result(60)
        with pytest.raises(kind) as caught:
            call(ckpt)
        assert_helpful(caught.value, kind, **fields)
        ckpt.save(50, STATE, when_busy="raise").result(60)
        assert {0, 50} <= set(ckpt.steps())
        assert ckpt.statistics().worker_restarts == 0


CALLS: dict[str, Callable[[blocking.Checkpointer], object]] = {
    "save": lambda ckpt: ckpt.save(1, STATE),
    "prepare": lambda ckpt: ckpt.prepare(STATE),
    "restore": lambda ckpt: ckpt.restore(STATE),
    "load": lambda ckpt: ckpt.load(),
    "steps": lambda ckpt: ckpt.steps(),
    "latest": lambda ckpt: ckpt.latest(),
    "verify": lambda ckpt: ckpt.verify(0),
    "wait_ready": lambda ckpt: ckpt.wait_ready(),
    "wait_idle": lambda ckpt: ckpt.wait_idle(),
    "statistics": lambda ckpt: ckpt.statistics(),
}


@pytest.mark.parametrize("when", ["before open", "after close"])
def test_calls_on_what_is_not_open(when: str, tmp_path: Path) -> None:
    """Every call says so, and what to do; closing again is harmless, and the run can be opened by the next one."""
    ckpt = blocking.Checkpointer(tmp_path)
    if when == "after close":
        ckpt.open()
        ckpt.save(0, STATE).result(60)
        ckpt.close()
    for call in CALLS.values():
        with pytest.raises(aiockpt.UsageError) as caught:
            call(ckpt)
        assert_helpful(caught.value, aiockpt.UsageError)
    ckpt.close()
    with blocking.Checkpointer(tmp_path) as other:
        other.save(1, STATE).result(60)


def test_a_run_that_is_open_in_this_process(tmp_path: Path) -> None:
    """By whatever path it comes; the first job goes on."""
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with blocking.Checkpointer(tmp_path / "run") as ckpt:
        for path in (tmp_path / "run", tmp_path / "link", tmp_path / "run" / ".." / "run"):
            with pytest.raises(aiockpt.ConfigError) as caught:
                blocking.Checkpointer(path).open()
            assert_helpful(caught.value, aiockpt.ConfigError, argument="run", path=os.path.abspath(path))
        ckpt.save(0, STATE).result(60)


def test_another_operating_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving says that it needs Linux; nothing was made."""
    monkeypatch.delattr(os, "pidfd_open")
    with pytest.raises(aiockpt.ConfigError, match="Linux only") as caught:
        blocking.Checkpointer(tmp_path / "run").open()
    assert_helpful(caught.value, aiockpt.ConfigError)
    assert not (tmp_path / "run").exists()
