"""Offsets of parts in headers: there and back, and never believed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiockpt.errors import CheckpointCorruptError
from aiockpt.format.image import Header, TensorSpec, lay_out, parse_header
from aiockpt.format.offsets import OFFSETS_KEY, offsets_metadata, saved_offsets

NAMES = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__")


def header_of(shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None) -> Header:
    layout = lay_out([TensorSpec(name, "U8", shape) for name, shape in shapes.items()], metadata)
    return parse_header(layout.header, file="f", file_nbytes=layout.nbytes)


@given(st.dictionaries(NAMES, st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1 << 40)), max_size=3), max_size=5))
def test_round_trip(tensors: dict[str, list[tuple[int, int]]]) -> None:
    """By way of the header, for any name; torch finds it under its own key."""
    shapes = {name: tuple(n for n, _ in dims) for name, dims in tensors.items()}
    offsets = {name: tuple(at for _, at in dims) for name, dims in tensors.items()}
    header = header_of(shapes, offsets_metadata(offsets))
    assert saved_offsets(header, file="f") == offsets
    listed = json.loads(header.metadata[OFFSETS_KEY])
    assert {name: tuple(item["saved_offsets"]) for name, item in listed.items()} == offsets


def test_a_file_of_whole_tensors() -> None:
    """It says nothing, and all of it is whole."""
    assert saved_offsets(header_of({"a": (2,)}, None), file="f") == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"a":{}}',
        '{"a":{"saved_offsets":[0]}}',
        '{"a":{"saved_offsets":[0,-1]}}',
        '{"a":{"saved_offsets":[0,1.5]}}',
        '{"a":{"saved_offsets":"00"}}',
        '{"b":{"saved_offsets":[0,0]}}',
        "[" * 5000,
    ],
)
def test_texts_that_are_none(text: str) -> None:
    """A tensor left out, or of another number of dimensions, is a corrupt file."""
    with pytest.raises(CheckpointCorruptError, match="not usable") as caught:
        saved_offsets(header_of({"a": (2, 2)}, {OFFSETS_KEY: text}), file="step-1/f")
    assert caught.value.file == "step-1/f"


def test_tensors_that_are_not_there() -> None:
    """Offsets of others are nothing to us."""
    text = '{"a":{"saved_offsets":[0]},"gone":{"saved_offsets":[1]}}'
    assert saved_offsets(header_of({"a": (2,)}, {OFFSETS_KEY: text}), file="f")["a"] == (0,)
