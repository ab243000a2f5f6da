"""States with every kind of tensor that a file holds, and comparing them bit by bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch

IN_SAFETENSORS = [
    "bool",
    "uint8",
    "int8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex64",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
]
"""Dtypes that safetensors' torch module names both ways."""


def every_dtype() -> dict[str, torch.Tensor]:
    """Return a tensor of each dtype, a 0-d one, empty ones, and one that is not contiguous."""
    torch.manual_seed(0)
    tensors = {name: random_bits(getattr(torch, name), (3, 4)) for name in IN_SAFETENSORS}
    tensors["bool"] = torch.rand(3, 4) > 0.5
    tensors["scalar"] = torch.tensor(0.1)
    tensors["scalar.int"] = torch.tensor(-7)
    tensors["empty"] = torch.empty(0, 5)
    tensors["empty.half"] = torch.empty(2, 0, 3, dtype=torch.float16)
    tensors["turned"] = torch.randn(4, 6).t()
    return tensors


def random_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor whose every bit is made up, infinities and NaNs included."""
    nbytes = dtype.itemsize
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * nbytes), dtype=torch.uint8).view(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


def assert_bit_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Fail unless both hold the same names with the same dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name
