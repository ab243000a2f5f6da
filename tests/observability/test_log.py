"""The log: one INFO line per checkpoint, for people and for programs."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import aiockpt
from aiockpt import blocking
from tests.support import stopped

pytestmark = pytest.mark.process

STATE: dict[str, Any] = {"x": torch.arange(1000), "n": 1}

LINE = re.compile(
    r"step (?P<step>\d+) saved: nbytes=(?P<nbytes>\d+) blocked_s=(?P<blocked_s>\S+) staged_s=(?P<staged_s>\S+) "
    r"durable_s=(?P<durable_s>\S+) gbps=(?P<gbps>\S+) path=(?P<path>.+)"
)


def test_one_line_per_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Exactly one, from ``aiockpt.save``, with the figures of the save; nothing else at INFO between open and close."""
    run = tmp_path / "a run"
    with caplog.at_level(logging.INFO, "aiockpt"), blocking.Checkpointer(run, keep=aiockpt.Latest(1)) as ckpt:
        saved = [ckpt.save(step, STATE).result(60) for step in (3, 4)]
    records = [record for record in caplog.records if record.levelno == logging.INFO]
    assert [record.name for record in records] == ["aiockpt.save"] * 2
    for record, one in zip(records, saved, strict=True):
        found = LINE.fullmatch(record.getMessage())
        assert found is not None, record.getMessage()
        assert (int(found["step"]), int(found["nbytes"]), found["path"]) == (one.step, one.nbytes, one.path)
        for name in ("blocked", "staged", "durable"):
            assert float(found[f"{name}_s"]) == pytest.approx(one.timings[name], abs=1e-4)
        assert float(found["gbps"]) == pytest.approx(one.nbytes / one.timings["durable"] / 1e9, abs=1e-3)


def test_no_line_without_a_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is cancelled or skipped is no checkpoint; a failure is raised, not logged as well."""
    with caplog.at_level(logging.INFO, "aiockpt"), blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.prepare(STATE)
        pid = ckpt.statistics().worker_pid
        assert pid is not None
        with stopped(pid):
            save = ckpt.save(0, STATE)
            ckpt.save(1, STATE, when_busy="skip")
            save.cancel()
        with pytest.raises(aiockpt.SaveCancelledError):
            save.result(60)
    assert [record for record in caplog.records if record.levelno in (logging.INFO, logging.ERROR)] == []
