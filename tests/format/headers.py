"""Headers as bytes, made by hand, for files that no writer of ours makes."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from aiockpt.errors import CheckpointCorruptError
from aiockpt.format.image import Header, parse_header


def header(text: str | bytes | dict[str, Any], *, pad: int = 0) -> bytes:
    """Return the length and the header; a dict becomes compact JSON."""
    if isinstance(text, dict):
        text = json.dumps(text, separators=(",", ":"), ensure_ascii=False)
    raw = text.encode() if isinstance(text, str) else text
    raw += b" " * pad
    return struct.pack("<Q", len(raw)) + raw


def tensor(start: int = 0, stop: int = 4, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    """Return what a header says of a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def parse(data: bytes, data_nbytes: int = 0) -> Header:
    """Parse a header that has ``data_nbytes`` of data behind it."""
    return parse_header(data, file="f", file_nbytes=len(data) + data_nbytes)


def refused(data: bytes, data_nbytes: int = 0, *, file_nbytes: int | None = None) -> CheckpointCorruptError:
    """Return the error that a header is answered with, after a look that it says what, why and next."""
    with pytest.raises(CheckpointCorruptError) as caught:
        parse_header(
            data,
            file="model/f.safetensors",
            file_nbytes=len(data) + data_nbytes if file_nbytes is None else file_nbytes,
        )
    error = caught.value
    assert error.file == "model/f.safetensors"
    assert "model/f.safetensors" in error.what
    assert error.why
    assert error.next
    assert isinstance(error.offset, int)
    assert error.offset >= 0
    return error
