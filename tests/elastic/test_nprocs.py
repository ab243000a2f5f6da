"""The number of trainers as a word."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aiockpt.elastic.nprocs import nprocs_of
from aiockpt.errors import ConfigError

CPUS = len(os.sched_getaffinity(0))


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    """Four GPUs, and what else the driver puts there."""
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia10", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "visible", "expected"),
    [
        ("3", None, 3),
        ("cpu", None, CPUS),
        ("gpu", None, 4),
        ("auto", None, 4),
        ("gpu", "1,3", 2),
        ("gpu", "GPU-5ebe,GPU-77ab,-1,0", 2),
        ("gpu", "0,1,2,3,4,5", 4),
        ("auto", "", CPUS),
    ],
)
def test_words(dev: Path, text: str, visible: str | None, expected: int) -> None:
    """GPUs are those that this host gives and that are not hidden; CPUs those that this process may run on."""
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert nprocs_of(text, environ=environ, dev=dev) == expected


def test_a_host_without_gpus(tmp_path: Path) -> None:
    """One trainer for each CPU, unless GPUs were asked for by name."""
    assert nprocs_of("auto", environ={}, dev=tmp_path) == CPUS
    with pytest.raises(ConfigError) as caught:
        nprocs_of("gpu", environ={}, dev=tmp_path)
    assert "no GPU is seen" in caught.value.why


@pytest.mark.parametrize("text", ["0", "-1", "", "two", "1.5", "\u0661", "1" * 20, "GPU"])
def test_what_is_no_number(dev: Path, text: str) -> None:
    """It is refused, and never taken for another one."""
    with pytest.raises(ConfigError, match="nprocs was refused"):
        nprocs_of(text, environ={}, dev=dev)
