"""``bench gpu`` without a GPU: that its programs run, and what it says; ``tests/gpu`` runs it on one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.gpu import SYSTEMS
from tests.bench.test_runs import bench

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]


def test_every_figure_is_there(tmp_path: Path) -> None:
    """On the CPU, where the figures mean nothing, and say so."""
    report = tmp_path / "gpu.json"
    small = ("--size", "2MiB", "--rounds", "1", "--steps", "2", "--step-ms", "1", "--peers", "none")
    done = bench("gpu", "--device", "cpu", *small, "--dir", tmp_path / "scratch", "--json", report)
    assert done.returncode == 0, done.stderr
    content = json.loads(report.read_text())
    assert "figures mean nothing" in content["machine"]["gpu"]
    assert content["floors"]["pinned_gbps"] > 0
    assert [(row["system"], row["case"]) for row in content["rows"]] == [("aiockpt", "guarded"), ("aiockpt", "inline")]
    for row in content["rows"]:
        assert 0 < row["blocked_s"] <= row["staged_s"] <= row["durable_s"]
        for name in ("copy_gbps", "pinned_gbps", "copy_ratio", "ratio_to_floor", "step_ratio_median", "step_ratio_p99"):
            assert row[name] > 0, name
        assert row["saves"] >= 1
    assert "of pinned" in done.stdout
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path) -> None:
    """One line, exit 1."""
    done = bench("gpu", "--size", "2MiB", "--peers", "none", "--dir", tmp_path)
    assert done.returncode == 1
    assert "aiockpt itself was not measured" in done.stderr
    assert "CUDA" in done.stderr


def test_the_peers_are_known_by_name() -> None:
    """DCP in a thread and in a process, with and without pinned memory, and torch_checkpointing."""
    assert {key.system for key in SYSTEMS} == {
        "aiockpt",
        "dcp.async_save thread",
        "dcp.async_save process",
        "torch_checkpointing",
    }
    assert len([key for key in SYSTEMS if "pinned" in key.case]) == 2
