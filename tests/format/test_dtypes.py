"""Sizes of tensors."""

from __future__ import annotations

import pytest

from aiockpt.format.dtypes import BITS, nbytes_of


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [
        ("F32", (), 4),
        ("F32", (0, 1 << 40), 0),
        ("BOOL", (3, 5), 15),
        ("F4", (2,), 1),
        ("F4", (3, 4), 6),
        ("C64", (2,), 16),
        ("U8", ((1 << 63) - 1,), (1 << 63) - 1),
        ("F64", (1,) * 1000, 8),
    ],
)
def test_nbytes(dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
    """Elements times bits, in whole bytes."""
    assert nbytes_of(dtype, shape) == nbytes


@pytest.mark.parametrize(
    ("dtype", "shape", "why"),
    [
        ("F128", (1,), "unknown"),
        ("f32", (1,), "unknown"),
        ("", (1,), "unknown"),
        ("F32", (2, -1), "negative"),
        ("F32", (0, -1), "negative"),
        ("F4", (), "whole bytes"),
        ("F4", (3, 3), "whole bytes"),
        ("U8", (1 << 63,), "64 bits"),
        ("U8", (1 << 40, 1 << 40, 0), "64 bits"),
        ("U8", (10**4000,) * 100_000, "64 bits"),
    ],
)
def test_no_tensor(dtype: str, shape: tuple[int, ...], why: str) -> None:
    """Refused, without multiplying on when there is no hope."""
    with pytest.raises(ValueError, match=why):
        nbytes_of(dtype, shape)


def test_the_dtypes_of_safetensors() -> None:
    """Twenty codes, none narrower than four bits."""
    assert len(BITS) == 20
    assert set(BITS.values()) == {4, 8, 16, 32, 64}
