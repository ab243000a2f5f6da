"""The dtypes that a checkpoint holds, between torch and the file's codes."""

from __future__ import annotations

import torch

__all__ = ["COMPLEX128", "PACKED_F4", "code_of", "live_form", "stored_form", "torch_dtype"]

COMPLEX128 = "C128"
"""Mark of a complex128 tensor, which safetensors has no code for: stored as F64 with a trailing 2."""
PACKED_F4 = "F4"
"""Two elements in a byte; torch counts bytes, the file counts elements, so the last dimension is doubled there."""

_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "F4": torch.float4_e2m1fn_x2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def code_of(dtype: torch.dtype) -> str | None:
    """Return the code that the file has for ``dtype``, or None where it has none (complex128 too)."""
    return _CODES.get(dtype)


def torch_dtype(code: str) -> torch.dtype:
    """Return the dtype of a code.

    Raises:
        KeyError: The file format has no such code.
    """
    return _DTYPES[code]


def stored_form(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], str] | None:
    """Return (code, shape, mark) in the file of a tensor with ``dtype`` and ``shape``; None where no file holds it."""
    if dtype is torch.complex128:
        return "F64", (*shape, 2), COMPLEX128
    code = _CODES.get(dtype)
    if code == PACKED_F4:
        return (code, (*shape[:-1], shape[-1] * 2), "") if shape else None
    return None if code is None else (code, shape, "")


def live_form(code: str, shape: tuple[int, ...], mark: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return (dtype, shape) of the tensor that stands in the file as ``code``, ``shape``, ``mark``."""
    if mark == COMPLEX128:
        return torch.complex128, shape[:-1]
    if code == PACKED_F4:
        return torch.float4_e2m1fn_x2, (*shape[:-1], shape[-1] // 2)
    return _DTYPES[code], shape
