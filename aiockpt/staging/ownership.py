"""Which memory belongs to which optimizer, worked out anew at each save.

Only memory that an optimizer owns may be copied behind the trainer's back: the guard stops exactly those writers.
Addresses are compared among tensors that are alive at the same moment, so equal address ranges are equal storages and
byte ranges; nothing is remembered from one save to the next, because the allocator gives freed addresses out again.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from aiockpt.staging.pending import Owner

__all__ = ["Ownership"]

_log = logging.getLogger("aiockpt.staging")

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})

Span = tuple[int, tuple[Owner, ...], torch.Tensor | None]
"""Bytes from the address on, the optimizers that own them, and the wrapper (a DTensor) whose counter counts too."""


class Ownership:
    """Address ranges of the parameters and state tensors of some optimizers.

    Args:
        optimizers: Alive, each one certain to call the guard before it writes.
        at_least: Bytes; smaller tensors are not of interest.
    """

    def __init__(self, optimizers: Iterable[Optimizer], at_least: int) -> None:
        self._at_least = at_least
        self.owners: list[Owner] = []
        """One for each optimizer that could be read."""
        self._spans: dict[int, Span] = {}
        self._starts: list[int] | None = None
        for optimizer in optimizers:
            try:
                self._add(optimizer)
            except Exception:  # noqa: BLE001  # a tensor subclass may raise anything; its optimizer is not guarded
                _log.debug("%s is not guarded", type(optimizer).__qualname__, exc_info=True)

    def __bool__(self) -> bool:
        return bool(self._spans)

    def find(self, address: int, nbytes: int) -> Span | None:
        """Return what owns all of ``[address, address + nbytes)``."""
        span = self._spans.get(address)
        if span is not None and nbytes <= span[0]:
            return span
        return self._find_inside(address, nbytes)

    def _find_inside(self, address: int, nbytes: int) -> Span | None:
        if self._starts is None:
            self._starts = sorted(self._spans)
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        start = self._starts[at]
        span = self._spans[start]
        return span if address + nbytes <= start + span[0] else None

    def _add(self, optimizer: Optimizer) -> None:
        owner = Owner(optimizer)
        spans: dict[int, Span] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                # FSDP1 frees and replaces the memory behind a flat parameter between forward and backward.
                if not getattr(parameter, "_is_flat_param", False):
                    self._add_tensor(spans, parameter, owner)
        for values in optimizer.state.values():
            for value in values.values():
                if isinstance(value, torch.Tensor):
                    self._add_tensor(spans, value, owner)
                elif isinstance(value, (list, tuple, Mapping)):  # LBFGS keeps lists
                    for tensor in _nested(value):
                        self._add_tensor(spans, tensor, owner)
        self.owners.append(owner)
        if not self._spans:
            self._spans = spans
            return
        for address, span in spans.items():
            other = self._spans.get(address)
            if other is not None:
                span = (max(span[0], other[0]), other[1] + span[1], span[2] if span[2] is not None else other[2])
            self._spans[address] = span

    def _add_tensor(self, spans: dict[int, Span], tensor: torch.Tensor, owner: Owner) -> None:
        wrapper: torch.Tensor | None = None
        if type(tensor) not in _PLAIN:
            # DTensor: its own data_ptr() is 0 for all, and its counter and the local tensor's move apart.
            local = getattr(tensor, "_local_tensor", None)
            if local is None or type(local) not in _PLAIN:
                return
            wrapper, tensor = tensor, local
        nbytes = tensor.nbytes
        if nbytes >= self._at_least:
            address = tensor.data_ptr()
            if address:
                spans[address] = (nbytes, (owner,), wrapper)


def _nested(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _nested(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _nested(inner)
