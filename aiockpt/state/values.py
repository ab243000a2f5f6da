"""Values with the types of torch and numpy added, and numpy arrays and large bytes as tensors."""

from __future__ import annotations

import base64
import ctypes
import sys
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import msgspec
import torch

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.names import Segments, dotted
from aiockpt.format.tree import Node, key_text
from aiockpt.format.values import MAX_DEPTH, decode_value, encode_value

__all__ = [
    "MAX_INLINE_BYTES",
    "MAX_VALUES_NBYTES",
    "blob_tensor",
    "blob_value",
    "decode_all",
    "decode_key",
    "encode_key",
    "encode_metadata",
    "encode_values",
    "is_text",
    "key_segment",
    "too_deep",
]

MAX_VALUES_NBYTES = 8 << 20
"""Of all encoded values of one rank: they travel in one frame of at most 16 MiB, and stand in the manifest."""
MAX_INLINE_BYTES = 4 << 10
"""Longer ``bytes`` and ``BytesIO`` are stored as tensors: base64 in the manifest is for small things."""

_NAMED_SEGMENTS = 8
"""Of the path to a container that has no end."""
_DTYPE_NAMES = {
    name: dtype for name, dtype in sorted(vars(torch).items()) if isinstance(dtype, torch.dtype)
}  # by every name that torch has for it; a dtype's own name is behind the dot of its repr


def encode_values(values: Sequence[tuple[Segments, object]]) -> bytes:
    """Return the JSON array of all values, by number.

    Raises:
        UnsupportedValueError: A value has a type that no checkpoint keeps, or all together take more than 8 MiB; names
            the largest.
    """
    encoded = [_encode(value, path) for path, value in values]
    text = msgspec.json.encode(encoded)
    if len(text) > MAX_VALUES_NBYTES:
        sizes = [len(msgspec.json.encode(item)) for item in encoded]
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        key = dotted(values[largest][0])
        raise UnsupportedValueError(
            f"the values of the state take {len(text):,} bytes, a checkpoint holds {MAX_VALUES_NBYTES:,}",
            why=f"the largest is {key!r} with {sizes[largest]:,} bytes",
            next="keep bulk data in tensors, numpy arrays or bytes, which have no such limit",
            key=key,
            type_name=type(values[largest][1]).__qualname__,
        )
    return text


def _encode(value: object, path: Segments) -> Any:
    try:
        return encode_value(value, key=path, more=_encode_more)
    except RecursionError as exc:
        raise too_deep(value, path) from exc


def too_deep(value: object, path: Segments) -> UnsupportedValueError:
    """Return the error for a container that has no end, or is too deep for the stack."""
    key = dotted(path[:_NAMED_SEGMENTS])
    return UnsupportedValueError(
        f"{key!r}{'…' * (len(path) > _NAMED_SEGMENTS)} cannot be saved: it is nested deeper than {MAX_DEPTH}",
        why="or it holds itself, and has no end",
        next="take the reference to the outer container out of the inner one",
        key=key,
        type_name=type(value).__qualname__,
    )


def encode_metadata(metadata: object) -> bytes:
    """Return the JSON of the user's metadata.

    Raises:
        UnsupportedValueError: As ``encode_values``; tensors are refused.
    """
    return encode_values([(("metadata",), metadata)])[1:-1]


def is_text(key: object) -> bool:
    """Tell whether a mapping's key is text that stands in JSON as it is: no lone surrogates, no subclass."""
    return type(key) is str and (key.isascii() or not any("\ud800" <= character <= "\udfff" for character in key))


def key_segment(key: object, path: Segments) -> str:
    """Return the segment that a mapping's key is in the names below it, as ``format.tree`` has it.

    Raises:
        UnsupportedValueError: As ``encode_key``.
    """
    return str(key) if is_text(key) else key_text(encode_key(key, path))


def encode_key(key: object, path: Segments) -> Any:
    """Return the JSON of a mapping's key, as it stands in a tree.

    Raises:
        UnsupportedValueError: A checkpoint has no such type.
    """
    return encode_value(key, key=(*path, repr(key)), more=_encode_more)


def decode_key(encoded: Any, file: str) -> Any:
    """Return the key that ``encode_key`` made ``encoded`` of.

    Raises:
        CheckpointCorruptError: It is not readable.
    """
    return decode_value(encoded, file=file, more=_DECODERS)


def decode_all(encoded: Sequence[Any], file: str) -> list[Any]:
    """Return the values that ``encode_values`` made ``encoded`` of.

    Raises:
        CheckpointCorruptError: One of them is not readable.
    """
    return [decode_value(item, file=file, more=_DECODERS) for item in encoded]


def blob_tensor(value: object, path: Segments) -> tuple[Node, torch.Tensor] | None:
    """Return (node with entry number 0, tensor) where ``value`` is stored as a tensor and is none, else None.

    The tensor is the memory of a numpy array where torch can see it so; a copy otherwise.

    Raises:
        UnsupportedValueError: An array of Python objects or with fields.
    """
    kind = type(value)
    if kind is bytes:
        if len(value) <= MAX_INLINE_BYTES:  # type: ignore[arg-type]  # kind says that it is bytes
            return None
        # bytearray: torch warns of memory that it must not write, and a BytesIO cannot grow while it is looked at.
        return ["bytes", 0], torch.frombuffer(bytearray(value), dtype=torch.uint8)  # type: ignore[call-overload]
    if kind is BytesIO:
        data = value.getvalue()  # type: ignore[attr-defined]
        if len(data) <= MAX_INLINE_BYTES:
            return None
        return ["BytesIO", 0, value.tell()], torch.frombuffer(bytearray(data), dtype=torch.uint8)  # type: ignore[attr-defined]
    numpy = sys.modules.get("numpy")
    if numpy is not None and kind is numpy.ndarray:
        return _array_tensor(numpy, value, path)
    return None


def blob_value(node: Node, tensor: torch.Tensor) -> object:
    """Return the value that ``blob_tensor`` made ``node`` and ``tensor`` (on the CPU) of; it is fresh.

    Raises:
        ValueError: The node's parts do not fit the tensor.
    """
    tensor = tensor.contiguous()
    raw = tensor.dtype is torch.uint8 and tensor.dim() == 1
    match node:
        case ["bytes", _] if raw:
            return _bytes_of(tensor)
        case ["BytesIO", _, int() as position] if raw and position >= 0:
            stream = BytesIO(_bytes_of(tensor))
            stream.seek(position)
            return stream
        case ["ndarray", _, str() as code]:
            return _array_value(code, tensor)
    raise ValueError(f"{node!r:.60} is no node of a value that is stored as a {tensor.dtype} tensor")


def _array_tensor(numpy: Any, array: Any, path: Segments) -> tuple[Node, torch.Tensor]:
    dtype = array.dtype
    if dtype.hasobject or dtype.kind == "V":
        raise UnsupportedValueError(
            f"{dotted(path)!r} cannot be saved: a numpy array of {dtype}",
            why="its elements are Python objects, or have fields",
            next="save plain arrays, one for each field",
            key=dotted(path),
            type_name=f"numpy.ndarray[{dtype}]",
        )
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = numpy.array(array, order="C")  # torch takes neither
    try:
        tensor = torch.from_numpy(array)
    except (TypeError, ValueError):  # text, dates, long doubles, foreign byte order: as bytes, one dimension more
        raw = numpy.ascontiguousarray(array).reshape(array.shape)
        tensor = torch.from_numpy(raw[..., None].view(numpy.uint8))
    return ["ndarray", 0, dtype.str], tensor


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.numel())  # Tensor.numpy() needs numpy, which we do not


def _array_value(code: str, tensor: torch.Tensor) -> object:
    import numpy as np

    try:
        dtype = np.dtype(code)
        array = tensor.numpy()
        if array.dtype != dtype:
            if array.dtype != np.uint8 or dtype.hasobject or dtype.kind == "V":
                raise ValueError(f"a {tensor.dtype} tensor holds no {dtype}")
            array = np.ascontiguousarray(array).view(dtype)[..., 0]
        return array.copy()
    except (TypeError, IndexError) as exc:
        raise ValueError(f"a {tensor.dtype} tensor holds no {code!r:.40}: {exc}") from exc


def _decode_device(json: Any) -> torch.device:
    try:
        return torch.device(json)
    except RuntimeError as exc:
        raise ValueError(str(exc)) from exc


def _encode_more(value: object) -> tuple[str, Any] | None:
    match value:
        case torch.Size():
            return "Size", list(value)
        case torch.dtype():
            return "dtype", str(value).removeprefix("torch.")
        case torch.device():
            return "device", str(value)
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.generic):
        return None
    dtype = value.dtype
    if dtype.kind in "OV" or type(value) is not dtype.type:
        return None
    return "numpy", [dtype.str, base64.b64encode(value.tobytes()).decode()]


def _decode_numpy(json: Any) -> Any:
    import numpy as np

    code, data = json
    return np.frombuffer(base64.b64decode(data, validate=True), dtype=np.dtype(code))[0]


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "Size": torch.Size,
    "dtype": lambda json: _DTYPE_NAMES[json],
    "device": _decode_device,
    "numpy": _decode_numpy,
}
