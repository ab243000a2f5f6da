"""Layout of a file: aligned, without holes, readable by others, and read back as it was laid out."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiockpt.format.dtypes import BITS, nbytes_of
from aiockpt.format.image import (
    ALIGN,
    BLOCK_NBYTES,
    BLOCKS_KEY,
    ImageLayout,
    TensorSpec,
    block_count,
    fill_sums,
    lay_out,
    parse_header,
    round_up,
)

safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")

NAMES = st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda name: name != "__metadata__")
METADATA = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda key: key not in ("format", BLOCKS_KEY)),
    st.text(st.characters(codec="utf-8"), max_size=8),
    max_size=3,
)


@st.composite
def specs(draw: Any) -> TensorSpec:
    dtype = draw(st.sampled_from(sorted(BITS)))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    if math.prod(shape) * BITS[dtype] % 8:
        shape = [*shape, 2]
    return TensorSpec(draw(NAMES), dtype, tuple(shape))


FILES = st.lists(specs(), max_size=12, unique_by=lambda spec: spec.name)


def image_of(layout: ImageLayout, sums: list[int]) -> bytes:
    """Return the bytes of the file, its data counting up."""
    header = bytearray(layout.header)
    fill_sums(header, layout.sums_at, sums)
    return bytes(header) + bytes(i % 251 for i in range(layout.nbytes - layout.data_start))


def no_sums(layout: ImageLayout) -> list[int]:
    return [0] * block_count(layout.nbytes - layout.data_start)


@settings(max_examples=150, deadline=None)
@given(FILES)
def test_layout(tensors: list[TensorSpec]) -> None:
    """Tensors fill the data section without overlap or hole, each aligned to its item size."""
    layout = lay_out(tensors)
    assert layout.data_start % ALIGN == 0
    assert len(layout.header) == layout.data_start
    position = layout.data_start
    for i in layout.order:
        assert layout.offsets[i] == position
        item_nbytes = max(BITS[tensors[i].dtype] // 8, 1)
        assert position % item_nbytes == 0
        position += nbytes_of(tensors[i].dtype, tensors[i].shape)
    assert position == layout.nbytes
    assert sorted(layout.order) == list(range(len(tensors)))


@settings(max_examples=150, deadline=None)
@given(FILES, METADATA)
def test_parse_gives_back_what_was_laid_out(tensors: list[TensorSpec], metadata: dict[str, str]) -> None:
    """A header that was laid out is read back: tensors, places, texts, checksums."""
    layout = lay_out(tensors, metadata)
    blocks = block_count(layout.nbytes - layout.data_start)
    sums = [(1 << 64) - 1 - n for n in range(blocks)]
    header = parse_header(image_of(layout, sums), file="f", file_nbytes=layout.nbytes)
    assert header.data_start == layout.data_start
    assert header.sums == tuple(sums)
    assert header.block_nbytes == BLOCK_NBYTES
    assert header.metadata.items() >= metadata.items()
    assert header.metadata["format"] == "pt"
    assert header.tensors.keys() == {spec.name for spec in tensors}
    for spec, offset in zip(tensors, layout.offsets, strict=True):
        stored = header.tensors[spec.name]
        assert (stored.dtype, stored.shape) == (spec.dtype, spec.shape)
        assert (stored.start, stored.stop) == (offset, offset + nbytes_of(spec.dtype, spec.shape))


@settings(max_examples=100, deadline=None)
@given(FILES)
def test_safetensors_reads_it(tensors: list[TensorSpec]) -> None:
    """The library that the format is from finds the same tensors with the same bytes."""
    layout = lay_out(tensors)
    image = image_of(layout, no_sums(layout))
    found = dict(safetensors.deserialize(image))
    assert found.keys() == {spec.name for spec in tensors}
    for spec, offset in zip(tensors, layout.offsets, strict=True):
        entry = found[spec.name]
        assert (entry["dtype"], entry["shape"]) == (spec.dtype, list(spec.shape))
        assert bytes(entry["data"]) == image[offset : offset + nbytes_of(spec.dtype, spec.shape)]


def test_safe_open_reads_texts_and_tensors(tmp_path: Path) -> None:
    """The way that transformers takes: metadata with ``format: pt``, then tensors by name."""
    layout = lay_out([TensorSpec("a", "U8", (3,)), TensorSpec("b.ü /", "I64", (2,))], {"note": 'q"uote'})
    path = tmp_path / "model.safetensors"
    path.write_bytes(image_of(layout, no_sums(layout)))
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata()["format"] == "pt"
        assert file.metadata()["note"] == 'q"uote'
        assert file.get_tensor("a").tolist() == [16, 17, 18]
        assert file.get_tensor("b.ü /").shape == (2,)


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(6)))
def test_order_does_not_matter(order: list[int]) -> None:
    """The file follows from names and dtypes, not from the order in which tensors were given."""
    tensors = [TensorSpec(f"t{i}", dtype, (i,)) for i, dtype in enumerate(["U8", "F64", "BF16", "F32", "U8", "I64"])]
    assert lay_out([tensors[i] for i in order]).header == lay_out(tensors).header


def test_one_checksum_for_each_block() -> None:
    """A data section has a checksum for each 16 MiB begun; an empty one has none."""
    assert [block_count(n) for n in (0, 1, BLOCK_NBYTES, BLOCK_NBYTES + 1)] == [0, 1, 1, 2]
    layout = lay_out([TensorSpec("a", "U8", (3 * BLOCK_NBYTES + 1,))])
    header = bytearray(layout.header)
    fill_sums(header, layout.sums_at, [1, 2, 3, 4])
    assert parse_header(bytes(header), file="f", file_nbytes=layout.nbytes).sums == (1, 2, 3, 4)


def test_a_file_without_checksums() -> None:
    """As others write them: nothing of ours is in it, and nothing else lies elsewhere."""
    tensors = [TensorSpec("a", "U8", (3,)), TensorSpec("b", "I64", (2,))]
    plain, layout = lay_out(tensors, {"note": "x"}, with_sums=False), lay_out(tensors, {"note": "x"})
    found = parse_header(plain.header, file="f", file_nbytes=plain.nbytes)
    assert found.metadata == {"format": "pt", "note": "x"}
    assert (found.block_nbytes, found.sums, plain.sums_at) == (0, (), 0)
    assert (plain.nbytes, plain.order, plain.offsets) == (layout.nbytes, layout.order, layout.offsets)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_wrong_number_of_checksums(count: int) -> None:
    """Checksums that do not fill their place are refused, and overwrite nothing."""
    layout = lay_out([TensorSpec("a", "U8", (BLOCK_NBYTES + 1,))])
    header = bytearray(layout.header)
    with pytest.raises(ValueError, match="do not fill"):
        fill_sums(header, layout.sums_at, [7] * count)
    assert bytes(header) == layout.header


def test_checksums_at_a_wrong_place() -> None:
    """A header of another file is refused."""
    layout = lay_out([TensorSpec("a", "U8", (1,))])
    with pytest.raises(ValueError, match="do not fill"):
        fill_sums(bytearray(layout.header), layout.sums_at + 1, [7])


def test_header_with_many_checksums_stays_small() -> None:
    """2 TiB in a file are 128 Ki checksums, 2 MiB of header, which is read back whole."""
    layout = lay_out([TensorSpec("a", "U8", (1 << 41,))])
    assert layout.data_start < (2 << 20) + 8192
    header = bytearray(layout.header)
    sums = list(range(1 << 17))
    fill_sums(header, layout.sums_at, sums)
    assert parse_header(bytes(header), file="f", file_nbytes=layout.nbytes).sums == tuple(sums)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ([TensorSpec("a", "U8", (1,)), TensorSpec("a", "U8", (2,))], None),
        ([TensorSpec("__metadata__", "U8", (1,))], None),
        ([TensorSpec("a", "C128", (1,))], None),
        ([TensorSpec("a", "U8", (-1,))], None),
        ([TensorSpec("a", "F4", (3,))], None),
        ([TensorSpec("\udc80", "U8", (1,))], None),
        ([TensorSpec("a", "U8", ((1 << 63) - 1,))], None),
        ([TensorSpec("a", "U8", (50 << 40,))], None),
        ([TensorSpec("x" * 100_000_000, "U8", (1,))], None),
        ([], {"format": "tf"}),
        ([], {BLOCKS_KEY: ""}),
        ([], {"a": "\udc80"}),
    ],
)
def test_what_cannot_be_laid_out(tensors: list[TensorSpec], metadata: dict[str, str] | None) -> None:
    """A ValueError instead of a file that no reader takes."""
    with pytest.raises(ValueError, match=r"."):
        lay_out(tensors, metadata)


def test_header_is_padded_with_spaces() -> None:
    """Data begins at a multiple of 4096; safetensors takes spaces behind the JSON and nothing else."""
    layout = lay_out([TensorSpec("a", "U8", (1,))])
    (length,) = struct.unpack("<Q", layout.header[:8])
    assert length == layout.data_start - 8
    assert layout.header[8:].rstrip(b" ").endswith(b"}")


@pytest.mark.parametrize(
    ("value", "up"), [(0, 0), (1, 4096), (4096, 4096), (4097, 8192), ((1 << 62) + 1, (1 << 62) + 4096)]
)
def test_round_up(value: int, up: int) -> None:
    """Exact for sizes beyond what a float holds."""
    assert round_up(value) == up
