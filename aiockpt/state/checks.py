"""Which tensors a checkpoint takes; asked before any pointer is read."""

from __future__ import annotations

import torch
from torch import nn

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.names import Segments, dotted

__all__ = ["PLAIN_TYPES", "is_plain", "refuse_tensor", "resolve"]

_is_transformed = torch._C._functorch.is_functorch_wrapped_tensor  # looked up once: this is asked of every tensor

PLAIN_TYPES = frozenset({torch.Tensor, nn.Parameter, nn.Buffer})


def is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether the tensor is one block of strided memory whose bytes are its elements."""
    return (
        type(tensor) in PLAIN_TYPES
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and (tensor.is_cpu or tensor.is_cuda)
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
        and not _is_transformed(tensor)
    )


def resolve(tensor: torch.Tensor, path: Segments) -> torch.Tensor:
    """Return a plain tensor equal to one that ``is_plain`` does not take: a copy for lazy conjugates and negatives.

    Raises:
        UnsupportedValueError: It is sparse, nested, meta, fake, lazy, of an unknown subclass, or on a device that is
            neither CPU nor CUDA; names the key.
    """
    why = _why_not(tensor)
    if why:
        raise refuse_tensor(tensor, path, why)
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.detach().resolve_conj().resolve_neg()


def refuse_tensor(tensor: torch.Tensor, path: Segments, why: str) -> UnsupportedValueError:
    """Return the error that names a tensor's key, type and dtype."""
    kind = type(tensor)
    key = dotted(path)
    return UnsupportedValueError(
        f"{key!r} cannot be saved: {kind.__module__}.{kind.__qualname__} of {tensor.dtype}",
        why=why,
        next="save a plain tensor made of it, or leave it out",
        key=key,
        type_name=f"{kind.__qualname__}[{str(tensor.dtype).removeprefix('torch.')}]",
    )


def _why_not(tensor: torch.Tensor) -> str:
    if torch.nn.parameter.is_lazy(tensor):
        return "it is a lazy parameter or buffer without a shape; run one forward pass before the first save"
    if tensor.is_nested:
        return "it is a nested tensor"
    if type(tensor) not in PLAIN_TYPES:
        return f"it is an unknown tensor subclass, {type(tensor).__qualname__}: what its memory means is not known"
    if _is_transformed(tensor):
        return "it lives inside a torch.func transform"
    if tensor.is_meta:
        return "it is a meta tensor, which has no data"
    if tensor.layout is not torch.strided:
        what = "mkldnn" if tensor.is_mkldnn else "sparse"
        return f"it is {what}: its layout is {tensor.layout}, not torch.strided"
    if not (tensor.is_cpu or tensor.is_cuda):
        return f"it is on {tensor.device}; only tensors on the CPU and on CUDA devices can be copied"
    return ""
