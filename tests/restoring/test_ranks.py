"""Checkpoints of several ranks, read by one: whole, and block by block, from any cut."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aiockpt.planning.placings import Placing
from aiockpt.planning.sharding import Cut
from aiockpt.restoring.load import load_checkpoint
from tests.restoring.ranked import PlacingOf, by_dim, cut_by, write_ranks
from tests.restoring.restoring import restore

WORLD = 4


def state_of(seed: int) -> dict[str, Any]:
    """A state with uneven, empty and odd tensors of all kinds."""
    drawn = torch.Generator().manual_seed(seed)

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=drawn).to(dtype)

    return {
        "model": {
            "even": tensor(8, 12),
            "uneven": tensor(7, 5, dtype=torch.bfloat16),
            "few": tensor(2, 3),
            "deep": tensor(3, 5, 9, dtype=torch.float64),
            "vector": tensor(11),
            "scalar": tensor(),
            "empty": tensor(0, 4),
            "complex": torch.complex(tensor(5, 6, dtype=torch.float64), tensor(5, 6, dtype=torch.float64)),
            "flags": tensor(9, 4) > 0,
            "fp8": tensor(6, 8).to(torch.float8_e4m3fn),
        },
        "array": np.arange(seed, seed + 5),
        "step": seed,
    }


def assert_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys()
        for key, item in expected.items():
            assert_equal(found[key], item)
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert bytes(found.contiguous().reshape(-1).view(torch.uint8).numpy()) == bytes(
            expected.contiguous().reshape(-1).view(torch.uint8).numpy()
        )
    else:
        assert np.array_equal(found, expected)


def mixed(name: str, shape: tuple[int, ...]) -> Placing:
    """A placing of each kind, by the length of the name."""
    kinds: list[Placing] = [None, by_dim(0, WORLD)(name, shape), by_dim(1, WORLD)(name, shape)]
    return None if name == "array" else kinds[len(name) % 3]


LAYOUTS: dict[str, PlacingOf] = {
    "rows": by_dim(0, WORLD),
    "columns": by_dim(1, WORLD),
    "2-D": cut_by((2, 2), Cut(0, 0), Cut(1, 1)),
    "both-on-rows": cut_by((2, 2), Cut(1, 0), Cut(0, 0)),
    "replicas": cut_by((2, 2), Cut(1, 0)),
    "strided": cut_by((4,), Cut(0, 0, 2)),
    "undeclared": lambda name, shape: None,
    "mixed": mixed,
}


def only_tensors_cut(placing_of: PlacingOf) -> PlacingOf:
    """Complex tensors have a last dimension of two in files, which nothing cuts."""

    def placing(name: str, shape: tuple[int, ...]) -> Placing:
        return placing_of(name, shape[:-1] if name == "model.complex" else shape) if name != "array" else None

    return placing


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_tensors_come_out_of_any_cut(tmp_path: Path, layout: str) -> None:
    """Loaded, mapped, and read into live memory of any strides."""
    state = state_of(1)
    write_ranks(tmp_path, [state] * WORLD, only_tensors_cut(LAYOUTS[layout]))
    assert_equal(load_checkpoint(tmp_path), state)
    assert_equal(load_checkpoint(tmp_path, mmap=True), state)
    live = state_of(2)
    live["model"]["even"] = torch.zeros(12, 8).t()
    live["model"]["deep"] = torch.zeros(3, 9, 5, dtype=torch.float64).transpose(1, 2)
    addresses = {name: tensor.data_ptr() for name, tensor in live["model"].items()}
    restore(tmp_path, live)
    assert_equal(live, state)
    assert {name: tensor.data_ptr() for name, tensor in live["model"].items()} == addresses


@pytest.mark.parametrize("world", [2, 3, 8])
def test_any_world(tmp_path: Path, world: int) -> None:
    """More ranks than rows among them."""
    state = state_of(3)
    write_ranks(tmp_path, [state] * world, only_tensors_cut(by_dim(0, world)))
    assert_equal(load_checkpoint(tmp_path), state)


def test_several_files_of_a_rank(tmp_path: Path) -> None:
    """Chunks are looked for in all of them."""
    state = state_of(4)
    placing_of = only_tensors_cut(cut_by((2, 2), Cut(0, 0, 2), Cut(1, 1)))
    directory = write_ranks(tmp_path, [state] * WORLD, placing_of, file_entries=1)
    assert len(list(directory.glob("model/*-of-00004.*safetensors"))) > 8
    assert_equal(load_checkpoint(tmp_path), state)
