"""Everything that a state may hold, through the real worker and back: views, dtypes, values, keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import aiockpt
from aiockpt import blocking
from aiockpt.format.dtypes import BITS
from aiockpt.state.dtypes import torch_dtype
from tests.state.rebuild import same
from tests.state.test_tensors import VIEWS
from tests.state.test_values import KEPT, KEYS

pytestmark = pytest.mark.process

DTYPES = {str(dtype): dtype for dtype in [*map(torch_dtype, BITS), torch.complex128]}


def filled(dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor whose bytes differ from each other."""
    if dtype is torch.bool:
        return torch.tensor([True, False, True])
    return torch.arange(48, dtype=torch.uint8).view(dtype)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return what a view reads as, in memory of its own."""
    return tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def everything() -> dict[str, Any]:
    tied = torch.arange(5.0)
    return {
        "views": dict(VIEWS),
        "dtypes": {name: filled(dtype) for name, dtype in DTYPES.items()},
        "values": {str(number): value for number, value in enumerate(KEPT)},
        "keys": {  # each in a mapping of its own: 1 and True are one key
            str(number): {key: torch.full((2,), float(number)), "beside": key}
            for number, key in enumerate(KEYS)
            if key != "\ud800"  # no file can name a tensor so
        },
        "a key/with dots. and ü": {"x.y": {"/": torch.ones(1)}},
        "tied": {"first": tied, "second": tied},
        "many": {f"t{number}": torch.full((3,), float(number)) for number in range(200)},
    }


def test_all_of_it_comes_back(tmp_path: Path) -> None:
    """Bit for bit and type for type, as fresh objects and as maps of the files; the parts that were asked for alone."""
    state = everything()
    expected = {**state, "views": {name: plain(view) for name, view in VIEWS.items()}}
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.save(0, state).result(60)
        assert ckpt.verify(0) > 0
        for mmap in (False, True):
            assert same(ckpt.load(0, mmap=mmap), expected)
        assert same(ckpt.load(include="dtypes.*"), {"dtypes": expected["dtypes"]})


def test_tensors_of_every_dtype_are_restored_in_place(tmp_path: Path) -> None:
    """Into the live memory; what does not fit is named and left, where that was asked for."""
    saved = everything()["dtypes"]
    live = {name: torch.zeros(48, dtype=torch.uint8).view(saved[name].dtype)[: len(saved[name])] for name in saved}
    live["torch.bool"] = torch.zeros(3, dtype=torch.bool)
    memory = {name: tensor.data_ptr() for name, tensor in live.items()}
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.save(0, {"dtypes": saved, "gone": torch.ones(1)}).result(60)
        state = {"dtypes": live, "new": torch.full((1,), 7.0)}
        with pytest.raises(aiockpt.StateMismatchError):
            ckpt.restore(state)
        restored = ckpt.restore(state, strict=False, exclude=["dtypes.torch.float64"])
        assert restored is not None
        assert (restored.missing, restored.unexpected) == (("new",), ("gone",))
        assert not live["torch.float64"].any()
        assert state["new"] == 7.0
        ckpt.restore(state, include="dtypes")
    assert same(live, saved)
    assert {name: tensor.data_ptr() for name, tensor in live.items()} == memory
