from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import aiockpt
from aiockpt.state.collect import collect
from aiockpt.state.objects import load_object
from aiockpt.state.rng import RNG
from tests.state.rebuild import round_trip, same


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """Leave the process's generators as they were."""
    state = RNG().state_dict()
    yield
    RNG().load_state_dict(state)


def draw() -> list[Any]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.random(),
        np.random.normal(),
        torch.rand(3),
        torch.randn(17),
        torch.randperm(5),
    ]


def test_generators_go_on_where_they_were():
    """Python's, numpy's and torch's generators give the same numbers again, in the middle of a pair of normals too."""
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    draw()
    random.gauss(0, 1)  # leaves the second of a pair behind
    np.random.normal()
    saved = round_trip({"rng": RNG()})["rng"]
    expected = draw()
    draw()
    load_object(RNG(), saved)
    assert same(draw(), expected)


def test_reading_draws_nothing():
    """A save between two draws changes neither."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    expected = draw()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    collect({"rng": RNG()})
    assert same(draw(), expected)


def test_generators_that_the_process_lacks_are_left_alone():
    """A state without numpy or CUDA, or with more devices than there are, loads what fits."""
    state = RNG().state_dict()
    del state["numpy"]
    before = np.random.get_state()
    state["cuda"] = [torch.zeros(16, dtype=torch.uint8)]
    if not torch.cuda.is_available():
        RNG().load_state_dict(state)
    assert same(np.random.get_state(), before)


WITHOUT_NUMPY = """
import sys
sys.modules["numpy"] = None
import torch, aiockpt
from tests.state.rebuild import round_trip, same
from aiockpt.state.objects import load_object
state = {"rng": aiockpt.RNG(), "b": b"x" * 9999, "v": (1, torch.float32), "t": torch.ones(2)}
back = round_trip(state)
assert sorted(back["rng"]) == ["python", "torch"]
assert back["b"] == state["b"] and back["v"] == state["v"]
load_object(aiockpt.RNG(), {**back["rng"], "numpy": ()})  # saved by a program that had it
"""


def test_a_program_without_numpy_saves_and_loads():
    """Numpy is no dependency: where it cannot be imported, all else works."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMPY], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr


def test_rng_is_a_public_frozen_value():
    """It has no fields, compares equal, and cannot be written to."""
    assert aiockpt.RNG is RNG
    assert RNG() == RNG()
    with pytest.raises(AttributeError):
        RNG().x = 1  # type: ignore[attr-defined]
