"""Live tensors of every layout and dtype get the right bytes, in their own memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aiockpt.state.dtypes import _DTYPES
from tests.restoring.restoring import restore
from tests.restoring.writing import write_step


def base() -> torch.Tensor:
    return torch.arange(24, dtype=torch.float32).reshape(4, 6)


LAYOUTS: dict[str, Any] = {
    "contiguous": lambda: torch.zeros(4, 6),
    "transposed": lambda: torch.zeros(6, 4).t(),
    "sliced": lambda: torch.zeros(8, 12)[::2, 1:7],
    "offset": lambda: torch.zeros(30)[6:].view(4, 6),
    "negated": lambda: torch._neg_view(torch.zeros(4, 6)),
    "leaf": lambda: torch.zeros(4, 6, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.zeros(4, 6)),
    "overlapping": lambda: torch.zeros(9).unfold(0, 6, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_written_in_place(layout: str, tmp_path: Path):
    """Strides, offsets, lazy negation, parameters; memory beside a view is not touched."""
    live = LAYOUTS[layout]()
    saved = torch.arange(9.0).unfold(0, 6, 1) if layout == "overlapping" else base()
    write_step(tmp_path, 1, {"x": saved})
    address = live.untyped_storage().data_ptr()
    restore(tmp_path, {"x": live})
    assert torch.equal(live.detach(), saved)
    assert live.untyped_storage().data_ptr() == address
    if layout == "sliced":
        whole = torch.empty(0).set_(live.untyped_storage()).view(8, 12)  # type: ignore[call-overload]
        assert whole[1::2].eq(0).all()
        assert whole[:, 7:].eq(0).all()


def test_conjugated_and_inference_tensors_are_written(tmp_path: Path):
    """A lazy conjugate gets what reads as the saved values; an inference tensor needs inference mode."""
    saved = torch.randn(3, 2, dtype=torch.complex64)
    write_step(tmp_path, 1, {"conj": saved, "inference": base(), "strided": base()})
    with torch.inference_mode():
        inference, strided = torch.zeros(4, 6), torch.zeros(6, 4).t()
    live = {"conj": torch.zeros(3, 2, dtype=torch.complex64).conj(), "inference": inference, "strided": strided}
    restore(tmp_path, live)
    assert torch.equal(live["conj"], saved)
    assert torch.equal(inference, base())
    assert torch.equal(strided, base())


@pytest.mark.parametrize("dtype", [*_DTYPES.values(), torch.complex128], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, strided: bool, tmp_path: Path):
    """NaN payloads, float8, packed float4 and complex128 too."""

    def empty() -> torch.Tensor:
        made = torch.zeros(2 * 3 * 4 * dtype.itemsize, dtype=torch.uint8).view(dtype).view(2, 3, 4)
        return made.transpose(0, 1) if strided else made.view(3, 2, 4)

    def raw(tensor: torch.Tensor) -> bytes:
        if tensor.element_size() == 1 and dtype is not torch.bool:
            tensor = tensor.view(torch.uint8)
        return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (24 * dtype.itemsize,), dtype=torch.uint8)
    saved = bits.view(dtype).view(3, 2, 4)
    write_step(tmp_path, 1, {"x": saved, "obj": {"y": saved}})
    live, taken = empty(), {"y": empty()}
    restore(tmp_path, {"x": live, "obj": taken})
    assert raw(live) == raw(saved)
    assert raw(taken["y"]) == raw(saved)


def test_zero_size_and_zero_dimensional_tensors(tmp_path: Path):
    """Nothing to read is no error."""
    write_step(tmp_path, 1, {"empty": torch.zeros(0, 3), "scalar": torch.tensor(5), "only": {"e": torch.zeros(0)}})
    live = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(0), "only": {"e": torch.zeros(0)}}
    restore(tmp_path, live)
    assert live["scalar"].item() == 5
    write_step(tmp_path, 2, {"empty": torch.zeros(0, 3)})
    restore(tmp_path, {"empty": torch.zeros(0, 3)})


def test_a_graph_from_before_refuses_its_backward_pass(tmp_path: Path):
    """The version counters say that the memory was overwritten."""
    weight = torch.ones(3, requires_grad=True)
    write_step(tmp_path, 1, {"w": weight})
    loss = (weight * weight).sum()
    restore(tmp_path, {"w": weight})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert weight.grad is None
    assert weight.requires_grad
    assert weight.grad_fn is None


def test_tensors_across_blocks_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With blocks of 4 KiB: tensors that span many, share one, and lie in several files, by several threads."""
    from tests.restoring import writing

    monkeypatch.setattr("aiockpt.format.image.BLOCK_NBYTES", 4096)
    monkeypatch.setattr(writing, "BLOCK_NBYTES", 4096)
    monkeypatch.setattr("aiockpt.format.image.block_count.__defaults__", (4096,))
    torch.manual_seed(0)
    saved = {
        f"folder{i}": {f"t{j}": torch.randn(j * 97 + 1, generator=None) for j in range(40)} | {"u": torch.randn(50, 60)}
        for i in range(3)
    }
    write_step(tmp_path, 1, saved)
    live = {
        name: {key: torch.zeros_like(t) if key != "u" else torch.zeros(60, 50).t() for key, t in folder.items()}
        for name, folder in saved.items()
    }
    for threads in (1, 8):
        for folder in live.values():
            for tensor in folder.values():
                tensor.zero_()
        restore(tmp_path, live, threads=threads)
        for name, folder in saved.items():
            for key, tensor in folder.items():
                assert torch.equal(live[name][key], tensor), (name, key)


def test_only_blocks_that_are_needed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Damage elsewhere does not matter to a part, and its bytes are not read."""
    from tests.restoring import writing

    monkeypatch.setattr("aiockpt.format.image.BLOCK_NBYTES", 4096)
    monkeypatch.setattr(writing, "BLOCK_NBYTES", 4096)
    monkeypatch.setattr("aiockpt.format.image.block_count.__defaults__", (4096,))
    step = write_step(tmp_path, 1, {"d": {f"t{i}": torch.full((1024,), float(i)) for i in range(4)}})
    (file,) = step.rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # t3 is last
    file.write_bytes(data)
    live = {"d": {f"t{i}": torch.zeros(1024) for i in range(4)}}
    restore(tmp_path, live, include=["d.t0", "d.t2"])
    assert [tensor[0].item() for tensor in live["d"].values()] == [0, 0, 2, 0]
