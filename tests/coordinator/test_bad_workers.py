"""Workers that do not come up, speak garbage, or die with last words: an error, never a hang."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import aiockpt
from aiockpt import blocking
from aiockpt.coordinator import process
from aiockpt.protocol.frames import encode
from aiockpt.protocol.messages import PROTOCOL_VERSION
from aiockpt.storage.faults import FaultPoint
from aiockpt.testing.faults import WORKER_ARGUMENT, FaultPlan, FaultRule
from tests.protocol.examples import our_hello
from tests.support import wait_until

pytestmark = pytest.mark.process

STATE: dict[str, Any] = {"x": torch.arange(10)}


SPOKEN = {
    "garbage": b"\x05\x00\x00\x00hello",
    "huge length": b"\xff\xff\xff\xff",
    "unknown tag": b"\x0b\x00\x00\x00\x81\xa2is\xa6absurd",
    "other protocol": encode(our_hello(protocol=PROTOCOL_VERSION + 1)),
    "other version": encode(our_hello(package="0.0.0")),
    "other installation": encode(our_hello(path="/elsewhere")),
    "no program of ours": b"\x04\x00\x00\x00\x81\xa1a\x01",
    "garbage behind hello": encode(our_hello()) + b"\x01\x00\x00\x00\xc1",
}


@pytest.mark.parametrize("case", SPOKEN)
def test_what_is_no_protocol(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``ProtocolError`` at open; the process is gone and the run free again."""
    speaker = "import os, sys, signal; os.write(int(sys.argv[1]), bytes.fromhex(sys.argv[2])); signal.pause()"
    monkeypatch.setattr(
        process, "command", lambda fd, _, *, faults: [sys.executable, "-c", speaker, str(fd), SPOKEN[case].hex()]
    )
    with pytest.raises(aiockpt.ProtocolError) as caught:
        blocking.Checkpointer(tmp_path).open()
    assert "next:" in str(caught.value)
    monkeypatch.undo()
    with blocking.Checkpointer(tmp_path) as ckpt:
        assert ckpt.steps() == []


def test_one_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``start_timeout`` ends the wait."""
    monkeypatch.setattr(process, "command", lambda *_, **__: [sys.executable, "-c", "import signal; signal.pause()"])
    with pytest.raises(aiockpt.WorkerStartError, match="not ready within 1 s"):
        blocking.Checkpointer(tmp_path, start_timeout=1).open()


def test_one_that_ends_with_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit status and last lines stand in the error."""
    words = "import sys; sys.stderr.write('no such library\\n'); sys.exit(7)"
    monkeypatch.setattr(process, "command", lambda *_, **__: [sys.executable, "-c", words])
    with pytest.raises(aiockpt.WorkerStartError) as caught:
        blocking.Checkpointer(tmp_path).open()
    assert caught.value.exit_status == 7
    assert caught.value.stderr == "no such library"
    assert "no such library" in str(caught.value)


def test_one_that_cannot_be_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system's refusal is a ``WorkerStartError`` too."""
    monkeypatch.setattr(process, "command", lambda *_, **__: ["/nonexistent/python"])
    with pytest.raises(aiockpt.WorkerStartError, match="No such file"):
        blocking.Checkpointer(tmp_path).open()


@pytest.mark.parametrize("action", ["kill", "stall"])
def test_one_that_dies_or_stops_while_starting(action: Any, tmp_path: Path) -> None:
    """Noticed at once, or at ``start_timeout``."""
    plan = FaultPlan(rules=[FaultRule(point=FaultPoint.WORKER_STARTED, action=action)])
    ckpt = blocking.Checkpointer(tmp_path, start_timeout=2)
    ckpt._coordinator.worker_faults = (WORKER_ARGUMENT, plan.to_json())
    with pytest.raises(aiockpt.WorkerStartError):
        ckpt.open()


def test_last_words_of_a_crash(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A crash in native code leaves its traceback in the trainer's log, with a prefix, and in the error."""
    with blocking.Checkpointer(tmp_path, restart=aiockpt.RestartPolicy(tries=0)) as ckpt:
        ckpt.save(0, STATE).result(60)
        pid = ckpt.statistics().worker_pid
        assert pid is not None
        os.kill(pid, signal.SIGSEGV)
        with pytest.raises(aiockpt.RestartLimitError) as caught:
            wait_until(lambda: ckpt.save(1, STATE, overwrite=True).result(60) and None, "the refusal")
    assert "SIGSEGV" in str(caught.value)
    assert "Segmentation fault" in str(caught.value)
    lines = [record for record in caplog.records if record.name == "aiockpt.worker"]
    assert any(f"worker {pid}: Fatal Python error" in record.getMessage() for record in lines)
    assert all(record.levelno == logging.WARNING for record in lines)


def test_too_large_an_arena(tmp_path: Path) -> None:
    """Refused with figures by the handle; training lives, and a smaller save works."""
    with blocking.Checkpointer(tmp_path, capacity=1 << 20) as ckpt:
        with pytest.raises(aiockpt.StorageError) as caught:
            ckpt.prepare({"x": torch.zeros(1 << 20)})
        save = ckpt.save(0, {"x": torch.zeros(1 << 20)})
        with pytest.raises(aiockpt.StorageError):
            save.result(60)
        assert caught.value.errno is not None
        assert "next:" in str(caught.value)
        ckpt.save(1, STATE).result(60)
        assert ckpt.steps() == [1]


def test_killed_while_allocating_is_too_large(tmp_path: Path) -> None:
    """What the kernel's memory killer does: an error with ENOMEM, no retry, a new worker."""
    plan = FaultPlan(rules=[FaultRule(point=FaultPoint.WORKER_ALLOCATING, action="kill")])
    ckpt = blocking.Checkpointer(tmp_path)
    ckpt._coordinator.worker_faults = (WORKER_ARGUMENT, plan.to_json())
    ckpt.open()
    ckpt._coordinator._supervisor.faults = None
    with pytest.raises(aiockpt.StorageError, match="no shared memory"):
        ckpt.save(0, STATE).result(60)
    ckpt.save(0, STATE).result(60)
    assert ckpt.statistics().worker_restarts == 1
    ckpt.close()
