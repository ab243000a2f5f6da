"""The dtypes of safetensors 0.8 by their codes."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["BITS", "nbytes_of"]

_MOST_ELEMENTS = (1 << 63) - 1
"""Also of the product on the way to a 0, as in torch and safetensors; bounds the work for a hostile shape."""

BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one element. ``F4`` is torch's ``float4_e2m1fn_x2``, whose last dimension is doubled in the file."""


def nbytes_of(dtype: str, shape: Sequence[int]) -> int:
    """Return the exact size of a tensor in bytes.

    Raises:
        ValueError: The dtype is unknown, a dimension is negative, there are more elements than 64 bits count, or
            sub-byte elements do not fill whole bytes.
    """
    bits = BITS.get(dtype)
    if bits is None:
        raise ValueError(f"dtype {dtype!r} is unknown")
    elements = 1
    for size in shape:
        elements *= size
        if size < 0:
            raise ValueError(f"a shape of {len(shape)} dimensions has a negative one")
        if elements > _MOST_ELEMENTS:
            raise ValueError(f"a shape of {len(shape)} dimensions has more elements than 64 bits count")
    total, rest = divmod(elements * bits, 8)
    if rest:
        raise ValueError(f"{elements} elements of {dtype} do not fill whole bytes")
    return total
