"""Headers that lie: always a CheckpointCorruptError, in bounded time and memory."""

from __future__ import annotations

import json
import struct
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiockpt.errors import CheckpointCorruptError
from aiockpt.format.image import BLOCK_NBYTES, MAX_BLOCK_NBYTES, TensorSpec, fill_sums, lay_out, parse_header
from tests.format.headers import header, parse, refused, tensor

ONE = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


def small_header() -> tuple[bytes, int]:
    """Return a header of ours without its padding, and the size of its data."""
    layout = lay_out([TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "BF16", (0,)), TensorSpec("c", "U8", ())])
    data = bytearray(layout.header)
    fill_sums(data, layout.sums_at, [0x0123456789ABCDEF])
    text = bytes(data[8:]).rstrip(b" ")
    return header(text), layout.nbytes - layout.data_start


SMALL, SMALL_DATA = small_header()


def test_the_small_header_is_good() -> None:
    """What the tests below break is whole before."""
    assert parse(SMALL, SMALL_DATA).sums == (0x0123456789ABCDEF,)


@pytest.mark.parametrize("length", range(len(SMALL)))
def test_truncated(length: int) -> None:
    """A header that ends anywhere before its end is refused, whatever is said of the file's size."""
    refused(SMALL[:length], file_nbytes=length)
    refused(SMALL[:length], file_nbytes=len(SMALL) + SMALL_DATA)


@pytest.mark.parametrize("length", range(8, len(SMALL)))
def test_truncated_with_a_length_that_fits(length: int) -> None:
    """JSON that ends anywhere before its end is refused."""
    refused(header(SMALL[8:length]), SMALL_DATA)


@pytest.mark.parametrize("more", [-SMALL_DATA, -1, 1, 4096, 1 << 62])
def test_data_of_another_size(more: int) -> None:
    """A file that is shorter or longer than its tensors is refused, a padded tail too."""
    refused(SMALL, SMALL_DATA + more)


def test_bit_flips() -> None:
    """Any one flipped bit gives a header (the manifest's checksum tells it from ours) or the error, nothing else."""
    for bit in range(8 * len(SMALL)):
        flipped = bytearray(SMALL)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found = parse_header(bytes(flipped), file="f", file_nbytes=len(SMALL) + SMALL_DATA)
        except CheckpointCorruptError:
            continue
        assert sum(stored.stop - stored.start for stored in found.tensors.values()) == SMALL_DATA


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutations(data: st.DataObject) -> None:
    """Bytes overwritten, removed and inserted anywhere give a header or the error, nothing else."""
    text = bytearray(SMALL[8:])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        stop = data.draw(st.integers(start, min(start + 8, len(text))))
        text[start:stop] = data.draw(
            st.binary(max_size=8) | st.sampled_from([b"[", b"{", b'"', b"-1", b"1e9", b"null"])
        )
    try:
        parse(header(bytes(text)), SMALL_DATA)
    except CheckpointCorruptError:
        return


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=3),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["U8", "F32", "F4", "X", ""]),
                "shape": st.lists(st.integers(-1, 3), max_size=3),
                "data_offsets": st.lists(st.integers(-1, 12), min_size=2, max_size=2),
            }
        ),
        max_size=4,
    ),
    st.integers(0, 12),
)
def test_random_claims(claims: dict[str, Any], data_nbytes: int) -> None:
    """Claims that are taken leave no overlap and no hole; all others are refused."""
    try:
        found = parse(header(claims), data_nbytes)
    except CheckpointCorruptError:
        return
    covered = [at for stored in found.tensors.values() for at in range(stored.start, stored.stop)]
    assert covered == list(range(found.data_start, found.data_start + data_nbytes))


LIES: dict[str, tuple[Any, int]] = {
    "overlap": ({"a": tensor(0, 4), "b": tensor(2, 6)}, 6),
    "the same bytes twice": ({"a": tensor(0, 4), "b": tensor(0, 4)}, 4),
    "hole": ({"a": tensor(0, 4), "b": tensor(8, 12)}, 12),
    "hole at the start": ({"a": tensor(4, 8)}, 8),
    "hole at the end": ({"a": tensor(0, 4)}, 8),
    "behind the end": ({"a": tensor(0, 4)}, 0),
    "backwards": ({"a": tensor(4, 0)}, 4),
    "negative": ({"a": tensor(-4, 0)}, 0),
    "empty at a wrong place": ({"a": tensor(0, 4), "b": tensor(2, 2, shape=[0])}, 4),
    "size and shape differ": ({"a": tensor(0, 4, shape=[2])}, 4),
    "unknown dtype": ({"a": tensor(dtype="F33")}, 4),
    "negative shape": ({"a": tensor(0, 4, shape=[-1, -1])}, 4),
    "huge shape": ({"a": tensor(0, 4, shape=[1 << 62, 1 << 62])}, 4),
    "huge shape that is empty": ({"a": tensor(0, 0, shape=[1 << 62, 1 << 62, 0])}, 0),
    "huge number": ('{"a":{"dtype":"U8","shape":[1' + "0" * 5000 + '],"data_offsets":[0,1]}}', 1),
    "huge offset": ({"a": tensor(0, 1 << 70, dtype="U8", shape=[1 << 70])}, 4),
    "half a byte": ({"a": tensor(0, 1, dtype="F4", shape=[1])}, 1),
    "float in shape": ({"a": tensor(shape=[1.0])}, 4),
    "bool in shape": ({"a": tensor(shape=[True])}, 4),
    "text for shape": ({"a": tensor(shape="1")}, 4),
    "null for shape": ({"a": tensor(shape=None)}, 4),
    "number for dtype": ({"a": tensor(dtype=32)}, 4),
    "one offset": ({"a": {"dtype": "U8", "shape": [], "data_offsets": [0]}}, 1),
    "three offsets": ({"a": {"dtype": "U8", "shape": [], "data_offsets": [0, 1, 1]}}, 1),
    "no offsets": ({"a": {"dtype": "U8", "shape": []}}, 1),
    "no dtype": ({"a": {"shape": [], "data_offsets": [0, 1]}}, 1),
    "tensor is null": ({"a": None}, 0),
    "tensor is a list": ({"a": []}, 0),
    "metadata is null": ({"__metadata__": None}, 0),
    "metadata is a list": ({"__metadata__": []}, 0),
    "metadata holds a number": ({"__metadata__": {"format": 1}}, 0),
    "metadata holds an object": ({"__metadata__": {"format": {}}}, 0),
    "not an object": ("[]", 0),
    "text": ('"a"', 0),
    "nothing": ("", 0),
    "spaces": ("    ", 0),
    "a space in front": (" {}", 0),
    "a byte order mark": ("\ufeff{}", 0),
    "more behind it": ("{} {}", 0),
    "zeros behind it": ("{}\0\0", 0),
    "NaN": ('{"a":NaN}', 0),
    "comment": ("{/**/}", 0),
    "trailing comma": ('{"a":' + ONE + ",}", 1),
    "no UTF-8 in a name": (b'{"\xff":' + ONE.encode() + b"}", 1),
    "no UTF-8 in a value": (b'{"__metadata__":{"a":"\xff"}}', 0),
    "no UTF-8 where nobody looks": (b'{"a":' + ONE[:-1].encode() + b',"x":"\xff"}}', 1),
    "lone surrogate": ('{"\\udc80":' + ONE + "}", 1),
    "the same tensor twice": ('{"a":' + ONE + ',"a":' + ONE + "}", 1),
    "the same tensor twice, escaped": ('{"a":' + ONE + ',"\\u0061":' + ONE + "}", 1),
    "the same empty tensor twice": ('{"a":%s,"a":%s}' % (('{"dtype":"U8","shape":[0],"data_offsets":[0,0]}',) * 2), 0),
    "metadata twice": ('{"__metadata__":{},"__metadata__":{}}', 0),
    "a key of metadata twice": ('{"__metadata__":{"a":"1","a":"2"}}', 0),
    "a field twice": ('{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1),
    "a field that nobody knows twice": ('{"a":' + ONE[:-1] + ',"x":1,"x":2}}', 1),
}


@pytest.mark.parametrize(("text", "data_nbytes"), LIES.values(), ids=LIES.keys())
def test_lies(text: Any, data_nbytes: int) -> None:
    """What a header must not say, one by one."""
    refused(header(text), data_nbytes)


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"a":[', '{"__metadata__":{"a":['])
@pytest.mark.parametrize("depth", [500, 2_000, 100_000])
@pytest.mark.parametrize("closed", [True, False])
def test_deep_nesting(opening: str, depth: int, closed: bool) -> None:
    """Nesting ends neither the process nor in another error."""
    closing = opening.translate({ord("["): "]", ord("{"): "}"})[::-1].replace(":", "").replace('"a"', "")
    text = opening * depth + ("1" + closing * depth if closed else "")
    refused(header(text.replace('"__metadata__"', "")))
    refused(header('{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":' + "[" * depth + "]" * depth + "}}x"))


@pytest.mark.parametrize("claim", [1, 100, 100_000_001, 1 << 32, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("file_nbytes", [10, 1 << 62])
def test_huge_length(claim: int, file_nbytes: int) -> None:
    """A length that the file cannot have costs nothing."""
    tracemalloc.start()
    try:
        refused(struct.pack("<Q", claim) + b"{}"[: claim == 100], file_nbytes=file_nbytes)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


SUMS = "0123456789abcdef"
FALSE_SUMS = {
    "unknown kind": f"crc32c:{BLOCK_NBYTES}:{SUMS}",
    "no kind": SUMS,
    "no size": f"xxh3-64::{SUMS}",
    "size with a sign": f"xxh3-64:+{BLOCK_NBYTES}:{SUMS}",
    "size with underscores": f"xxh3-64:16_777_216:{SUMS}",
    "size with zeros in front": f"xxh3-64:0{BLOCK_NBYTES}:{SUMS}",
    "size of other digits": f"xxh3-64:\u0661{BLOCK_NBYTES}:{SUMS}",
    "size 0": f"xxh3-64:0:{SUMS}",
    "size below a disk block": f"xxh3-64:512:{SUMS}",
    "size that is no multiple": f"xxh3-64:{BLOCK_NBYTES + 1}:{SUMS}",
    "size that fits no memory": f"xxh3-64:{1 << 38}:{SUMS}",
    "size over the limit": f"xxh3-64:{MAX_BLOCK_NBYTES + 4096}:{SUMS}",
    "size of many digits": f"xxh3-64:{'9' * 5000}:{SUMS}",
    "too few": f"xxh3-64:{BLOCK_NBYTES}:",
    "too many": f"xxh3-64:{BLOCK_NBYTES}:{SUMS}{SUMS}",
    "half of one": f"xxh3-64:{BLOCK_NBYTES}:{SUMS[:8]}",
    "no digits": f"xxh3-64:{BLOCK_NBYTES}:{'g' * 16}",
    "capitals": f"xxh3-64:{BLOCK_NBYTES}:{SUMS.upper()}",
    "a sign": f"xxh3-64:{BLOCK_NBYTES}:+{SUMS[1:]}",
    "underscores": f"xxh3-64:{BLOCK_NBYTES}:0_0{SUMS[3:]}",
    "0x": f"xxh3-64:{BLOCK_NBYTES}:0x{SUMS[2:]}",
    "a space": f"xxh3-64:{BLOCK_NBYTES}: {SUMS[1:]}",
    "a newline behind": f"xxh3-64:{BLOCK_NBYTES}:{SUMS}\n",
}


@pytest.mark.parametrize("text", FALSE_SUMS.values(), ids=FALSE_SUMS.keys())
def test_false_checksums(text: str) -> None:
    """Checksums are exactly what the format says, or the file is refused."""
    refused(header({"__metadata__": {"aiockpt.blocks": text}, "a": tensor()}), 4)


def test_checksums_of_other_block_sizes() -> None:
    """A later writer may choose another size of block, within the limits."""
    for size in (4096, MAX_BLOCK_NBYTES):
        found = parse(header({"__metadata__": {"aiockpt.blocks": f"xxh3-64:{size}:{SUMS}"}, "a": tensor()}), 4)
        assert (found.block_nbytes, found.sums) == (size, (int(SUMS, 16),))


def test_files_of_others() -> None:
    """Headers that others write are read: other spacing and order, fields that we do not know, no checksums."""
    text = json.dumps({"b": tensor(4, 8) | {"note": [1]}, "a": tensor(0, 4), "__metadata__": {"k": "v"}}, indent=2)
    found = parse(header(text, pad=3), 8)
    assert list(found.tensors) == ["a", "b"]
    assert found.metadata == {"k": "v"}
    assert (found.block_nbytes, found.sums) == (0, ())
    assert parse(header("{}")).tensors == {}


def test_memory_is_bounded_by_the_header() -> None:
    """Claims cost what their text costs: a header of 1 MB that is refused took less than 40."""
    shape = ",".join(["4611686018427387904"] * 50_000)
    tracemalloc.start()
    try:
        refused(header('{"a":{"dtype":"U8","shape":[' + shape + '],"data_offsets":[0,1]}}'), 1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40_000_000


def test_long_names_do_not_flood_the_error() -> None:
    """The error of a tensor with a name of 1 MB can be read."""
    error = refused(header({"x" * 1_000_000: tensor(4, 8)}), 8)
    assert len(str(error)) < 1000
