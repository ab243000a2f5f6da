"""Checkpoints of several ranks, read by one: whole, and block by block, from any cut."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aiockpt.errors import CheckpointCorruptError, StateMismatchError
from aiockpt.planning.placings import Placing
from aiockpt.planning.sharding import Cut
from aiockpt.restoring.load import load_checkpoint
from tests.restoring.ranked import PlacingOf, by_dim, cut_by, write_ranks
from tests.restoring.restoring import restore
from tests.restoring.writing import rewrite_manifest

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


def own_states(world: int) -> list[dict[str, Any]]:
    """A model that is common to all, and things that each rank has for itself, of differing structure."""
    states = []
    for rank in range(world):
        own = {"seed": rank, "noise": torch.full((rank + 2,), float(rank)), "more": [1] * rank}
        states.append({"model": {"w": torch.arange(6.0)}, "own": own, "epoch": 7})
    return states


def own_target() -> dict[str, Any]:
    return {"model": {"w": torch.zeros(6)}, "own": {"seed": -1, "noise": None, "more": None}, "epoch": 0}


def test_each_rank_has_its_own_again(tmp_path: Path) -> None:
    """Tensors, numbers and lists by rank; what is loaded without a rank is that of rank 0."""
    states = own_states(3)
    write_ranks(tmp_path, states, by_dim(0, 3), own=["own"])
    for rank, state in enumerate(states):
        live = own_target()
        restore(tmp_path, live, rank=rank)
        assert_equal(live["own"]["noise"], state["own"]["noise"])
        assert live["own"]["seed"] == rank
        assert live["own"]["more"] == [1] * rank
        assert_equal(live["model"]["w"], state["model"]["w"])
    assert_equal(load_checkpoint(tmp_path), states[0])


def test_a_rank_that_was_not_there_is_told_what_to_do(tmp_path: Path) -> None:
    """Nothing of another rank is taken for its own."""
    write_ranks(tmp_path, own_states(3), by_dim(0, 3), own=["own"])
    live = own_target()
    with pytest.raises(StateMismatchError) as caught:
        restore(tmp_path, live, rank=3)
    assert caught.value.missing == ("own.seed", "own.noise", "own.more")
    assert "each rank saved its own own: there are those of ranks 0 to 2, this is 3" in str(caught.value)
    assert "exclude=['own']" in caught.value.next
    assert not live["model"]["w"].any()
    outcome = restore(tmp_path, live, rank=3, strict=False)
    assert outcome is not None
    assert outcome.missing == ("own.seed", "own.noise", "own.more")
    assert live["epoch"] == 7
    live = own_target()
    restore(tmp_path, live, rank=3, exclude=["own"])
    assert_equal(live["model"]["w"], torch.arange(6.0))
    assert live["own"]["seed"] == -1


def test_include_takes_a_part_of_a_cut_state(tmp_path: Path) -> None:
    """Other tensors stay as they are, and their files may be unreadable."""
    state = {"model": {"a": torch.ones(8), "b": torch.ones(8)}, "other": {"c": torch.ones(8)}}
    directory = write_ranks(tmp_path, [state] * WORLD, by_dim(0, WORLD))
    for path in directory.glob("other/*.safetensors"):
        damage(path)
    live = {"model": {"a": torch.zeros(8), "b": torch.zeros(8)}, "other": {"c": torch.zeros(8)}}
    restore(tmp_path, live, include=["model.a"])
    assert [float(tensor.sum()) for part in live.values() for tensor in part.values()] == [8, 0, 0]
    assert list(load_checkpoint(tmp_path, include="model.b")["model"]) == ["b"]


def test_a_bad_block_of_one_rank_sends_all_to_the_older_step(tmp_path: Path) -> None:
    """The file of the rank is named."""
    write_ranks(tmp_path, [state_of(1)] * WORLD, only_tensors_cut(by_dim(0, WORLD)), step=1)
    newest = write_ranks(tmp_path, [state_of(2)] * WORLD, only_tensors_cut(by_dim(0, WORLD)), step=2)
    damage(newest / "model" / "model-00003-of-00004.safetensors")
    live = state_of(3)
    outcome = restore(tmp_path, live)
    assert outcome is not None
    assert outcome.step == 1
    assert "model-00003-of-00004" in outcome.skipped[2]
    assert_equal(live, state_of(1))


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_plan_that_lies_about_its_chunks_is_refused(tmp_path: Path) -> None:
    """Another cut, another replica, a shape that no files hold: found before anything live changes."""
    state = {"model": {"w": torch.ones(8, 4)}}
    for number, changes in enumerate(
        (
            {"placings": [{"mesh": [4], "cuts": [[0, 1, 1]], "strides": [1]}]},
            {"placings": [{"mesh": [2], "cuts": [[0, 0, 1]], "strides": [2]}]},
            {"classes": [["F32", [1 << 40, 4], ""]]},
            {"classes": [["F32", [8, 5], ""]]},
            {"classes": [["F64", [8, 2], "C128"]], "placings": [{"mesh": [4], "cuts": [[0, 1, 1]], "strides": [1]}]},
        )
    ):
        run = tmp_path / str(number)
        directory = write_ranks(run, [state] * WORLD, by_dim(0, WORLD))
        rewrite_manifest(directory, plan=changes)
        with pytest.raises(CheckpointCorruptError):
            load_checkpoint(directory)


def test_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    """Files are closed behind their last block."""
    world = 120
    full = torch.arange(world * 3.0).reshape(world, 3)
    write_ranks(tmp_path, [{"model": {"w": full}}] * world, by_dim(0, world))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    live = {"model": {"w": torch.zeros(world, 3)}}
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 80, hard))
        restore(tmp_path, live)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert torch.equal(live["model"]["w"], full)
