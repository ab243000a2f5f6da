"""Which elements are looked at, and what is found by them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiockpt.staging.canaries import points, take
from aiockpt.staging.layout import plain


@given(st.integers(1, 20_000), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([4, 16, 64, 256, 4096]))
def test_first_last_and_one_per_distance(numel: int, itemsize: int, nbytes: int) -> None:
    """The first and the last element are always there, neighbours are never further apart, and few are taken."""
    (rows, columns), (shift, pitch) = points(numel, itemsize, nbytes)
    taken = sorted({row * shift + column * pitch for row in range(rows) for column in range(columns)})
    distance = max(1, nbytes // itemsize)
    assert taken[0] == 0
    assert taken[-1] == numel - 1
    assert all(after - before <= distance for before, after in itertools.pairwise(taken))
    assert len(taken) <= 3 * numel // distance + 4


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_a_changed_canary_is_found(dtype: torch.dtype) -> None:
    """By index, whichever element of the taken ones changed."""
    tensors = [torch.zeros(200, dtype=torch.uint8).view(dtype).clone() for _ in range(3)]
    combs = [points(t.numel(), t.element_size(), 64) for t in tensors]

    def views() -> list[torch.Tensor]:
        return [plain(t).as_strided(*comb) for t, comb in zip(tensors, combs, strict=True)]

    canaries = take(views())
    assert canaries.differing(views()) == []
    tensors[1].view(torch.uint8)[-1] = 1
    tensors[2].view(torch.uint8)[0] = 1
    assert canaries.differing(views()) == [1, 2]


def test_bytes_are_compared_not_numbers() -> None:
    """NaN equals NaN, 0.0 differs from -0.0, and dtypes may be mixed."""
    mixed = [torch.full((4,), float("nan")), torch.zeros(4), torch.zeros(4, dtype=torch.int32)]
    views = [t.as_strided((2, 1), (3, 1)) for t in mixed]
    canaries = take(views)
    assert canaries.differing(views) == []
    mixed[1].neg_()
    assert canaries.differing(views) == [1]
    kept = canaries.kept_in([values.clone() for values in canaries.values])
    assert kept.differing(views) == [1]
