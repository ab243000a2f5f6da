"""Canaries: a few elements of every tensor that is copied later, taken at the call.

The staged bytes must equal them. That finds what version counters cannot see: fused kernels, ``.data``, numpy, dlpack,
collectives. Of each tensor the first, the last and one element per 256 KiB are taken; a writer that touches a tensor
touches all of it in practice. All of them are read by one ``as_strided`` per tensor with one ``cat`` per dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["CANARY_NBYTES", "Canaries", "Points", "points", "take"]

CANARY_NBYTES = 256 << 10
"""Bytes of a tensor that one canary stands for."""


class Points(NamedTuple):
    """Arguments of ``as_strided`` that pick the canaries of a contiguous tensor: two rows."""

    size: tuple[int, int]
    stride: tuple[int, int]


def points(numel: int, itemsize: int, canary_nbytes: int = CANARY_NBYTES) -> Points:
    """Choose the elements to look at.

    Args:
        numel: Elements of the tensor, at least 1.
        itemsize: Bytes of one element.
        canary_nbytes: Distance between canaries.

    Returns:
        Two interleaved combs: row 0 begins at the first element, row 1 ends at the last, neighbours lie at most
        ``canary_nbytes`` apart. One ``as_strided`` takes both; one comb could seldom meet both ends.
    """
    distance = max(1, canary_nbytes // itemsize)
    last = numel - 1
    per_row = max(1, -(-(last + distance) // (2 * distance)))
    while True:
        teeth = 2 * per_row - 1  # distances between the elements of both rows together
        pitch = (2 * last) // teeth if per_row > 1 else 1
        shift = last - (per_row - 1) * pitch
        if shift <= distance and (per_row == 1 or pitch - shift <= distance):
            return Points((2, per_row), (shift, pitch))
        per_row += 1


class Canaries:
    """What the canaries of some tensors were.

    Args:
        groups: Per dtype the indices of the tensors, and their values in that order, two rows.
    """

    def __init__(self, groups: list[tuple[list[int], torch.Tensor]]) -> None:
        self._groups = groups

    @property
    def values(self) -> list[torch.Tensor]:
        """What they were, a tensor for each dtype."""
        return [values for _, values in self._groups]

    def kept_in(self, values: Sequence[torch.Tensor]) -> Canaries:
        """Return the same canaries with their ``values`` elsewhere."""
        return Canaries([(indices, kept) for (indices, _), kept in zip(self._groups, values, strict=True)])

    def differing(self, staged: Sequence[torch.Tensor]) -> list[int]:
        """Compare with the staged copies.

        Args:
            staged: ``points`` views of the copies, in the order that ``take`` was given.

        Returns:
            Indices of the tensors whose bytes are not those of the call.
        """
        found: list[int] = []
        for indices, values in self._groups:
            views = [staged[i] for i in indices]
            now = torch.cat(views, dim=1)
            if torch.equal(as_bytes(now), as_bytes(values)):
                continue
            column = 0
            for i, view in zip(indices, views, strict=True):
                stop = column + view.shape[1]
                if not torch.equal(as_bytes(now[:, column:stop]), as_bytes(values[:, column:stop])):
                    found.append(i)
                column = stop
        return found


def take(views: Sequence[torch.Tensor]) -> Canaries:
    """Read canaries aside.

    Args:
        views: ``points`` views of live tensors of one device. On the CPU the values are copied when this returns, on
            CUDA they are in order on the current stream.
    """
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, view in enumerate(views):
        by_dtype.setdefault(view.dtype, []).append(i)
    return Canaries([(indices, torch.cat([views[i] for i in indices], dim=1)) for indices in by_dtype.values()])


def as_bytes(values: torch.Tensor) -> torch.Tensor:
    """Return the bytes, so that NaN equals NaN and 0.0 differs from -0.0."""
    return values.contiguous().view(torch.uint8)
