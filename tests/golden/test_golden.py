"""Bytes of released versions: written once, never made again by a test."""

from __future__ import annotations

import datetime
import math
from collections import Counter, OrderedDict, defaultdict
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import xxhash

from aiockpt.format.image import TensorSpec, fill_sums, lay_out, parse_header
from aiockpt.format.manifest import FileRecord, Head, decode_manifest, encode_manifest, parse_head
from aiockpt.format.tree import children, walk
from aiockpt.format.values import decode_value
from aiockpt.protocol.frames import FrameDecoder, encode
from tests.protocol.examples import EXAMPLES

HERE = Path(__file__).parent


def read_hex(name: str) -> dict[str, bytes]:
    """Return the records of a file: a name, a colon, hexadecimal digits over one or more lines."""
    records: dict[str, bytes] = {}
    for line in (HERE / name).read_text(encoding="ascii").splitlines():
        if line.startswith("#") or not line:
            continue
        if line.endswith(":"):
            name = line[:-1]
            records[name] = b""
        else:
            records[name] += bytes.fromhex(line)
    return records


FRAMES = read_hex("protocol-1.hex")


def test_golden_frames_are_complete() -> None:
    """Every message has its golden bytes."""
    assert FRAMES.keys() == EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_protocol_1(name: str) -> None:
    """Protocol version 1 is these bytes, in both directions."""
    assert encode(EXAMPLES[name]) == FRAMES[name]
    assert FrameDecoder().feed(FRAMES[name]) == [EXAMPLES[name]]


SPECS = [
    TensorSpec("bias", "BF16", (3,)),
    TensorSpec("weight", "F32", (2, 2)),
    TensorSpec("scale", "F64", ()),
    TensorSpec("mask", "BOOL", (0, 5)),
    TensorSpec("gewicht.ü", "U8", (5,)),
]
IMAGE = (HERE / "format-1.safetensors").read_bytes()
MANIFEST = (HERE / "format-1.manifest.json").read_bytes()


def test_image_of_format_1() -> None:
    """A file of format version 1 is these bytes: the header as laid out, its checksums, tensors without holes."""
    layout = lay_out(SPECS)
    data = IMAGE[layout.data_start :]
    header = bytearray(layout.header)
    fill_sums(header, layout.sums_at, [xxhash.xxh3_64_intdigest(data)])
    assert bytes(header) == IMAGE[: layout.data_start]
    assert (layout.data_start, layout.nbytes, len(IMAGE)) == (4096, 4096 + 35, 4096 + 35)


def test_reading_the_image_of_format_1() -> None:
    """A reader finds each tensor of a file of format version 1, and its checksum."""
    header = parse_header(IMAGE, file="golden", file_nbytes=len(IMAGE))
    found = {name: IMAGE[stored.start : stored.stop] for name, stored in header.tensors.items()}
    assert list(found) == ["scale", "weight", "bias", "gewicht.ü", "mask"]
    assert found["scale"] == bytes.fromhex("000000000000f83f")
    assert found["weight"] == bytes.fromhex("0000803f 00000040 00004040 00008040")
    assert found["bias"] == bytes.fromhex("803f 0040 4040")
    assert found["gewicht.ü"] == b"\x01\x02\x03\x04\x05"
    assert found["mask"] == b""
    assert header.block_nbytes == 16 << 20
    assert header.sums == (xxhash.xxh3_64_intdigest(IMAGE[4096:]),)


def test_safetensors_reads_the_image_of_format_1() -> None:
    """Files of format version 1 are for others too."""
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
    found = dict(safetensors.deserialize(IMAGE))
    assert found["weight"]["shape"] == [2, 2]
    assert bytes(found["gewicht.ü"]["data"]) == b"\x01\x02\x03\x04\x05"


HEAD = Head(
    format=1,
    step=1200,
    term=7,
    ordinal=13,
    save_id="0b6f1c9e-5d2a-4f7e-9c1b-3a8d7e6f5c4b",
    world_size=1,
    nbytes=35,
    created="2026-01-02T03:04:05+00:00",
    package="0.1.0",
)


VALUES: list[Any] = [
    {"lr": 0.1, "betas": (0.9, 0.999), "amsgrad": False, "foreach": None},
    [1 << 70, -(1 << 63), (1 << 64) - 1, -0.0, 5e-324, math.inf, -math.inf],
    complex(1.5, -0.0),
    b"\x00\xff",
    "text with \udc80, ü and \0",
    {"~tuple": 1},
    {1: "a", (2, None): "b", b"c": {}},
    {1, 2},
    frozenset({("b", 3)}),
    OrderedDict([("b", 1), ("a", 2)]),
    Counter({"x": 3}),
    defaultdict(list, {"k": [1]}),
    defaultdict(None, {}),
    datetime.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=datetime.timezone(datetime.timedelta(hours=1), "CET")),
    datetime.datetime(2026, 10, 25, 2, 30, fold=1),
    Path("/data/\udcff/x"),
]
"""What stands in the golden manifest, by number; -17 is a BytesIO, which has no equality."""


def test_manifest_of_format_1() -> None:
    """A manifest of format version 1 is these bytes, and a reader finds everything in it."""
    manifest = decode_manifest(MANIFEST, file="golden")
    assert manifest.head == parse_head(MANIFEST[:512], file="golden") == HEAD
    assert manifest.files == [
        FileRecord(path="model/model-00001-of-00001.safetensors", nbytes=4131, data_start=4096, sum="6f" * 16),
        FileRecord(path="model/model.safetensors.index.json", nbytes=310, data_start=0, sum="07" * 16),
    ]
    plan = manifest.plan
    assert plan.classes == [("BF16", [3], ""), ("U8", [5], ""), ("BOOL", [0, 5], ""), ("F64", [2], "C128")]
    assert plan.names == ["bias", "gewicht.ü", "mask", "scale"]
    assert (plan.entry_classes, plan.entry_files) == ([0, 1, 2, 3], [0, 0, 0, 0])
    assert dict(walk(plan.tree)) == {
        ("model", "bias"): 0,
        ("model", "gewicht.ü"): ["ndarray", 1, "<u1"],
        ("model", "mask"): 2,
        ("model", "tied"): 2,
        ("model", "scale"): 3,
        ("progress", "7"): -1,
        ("progress", "null"): -2,
        **{("progress", "rest", str(i)): -3 - i for i in range(len(VALUES) - 1)},
    }
    assert plan.tree["model"][2] == -16
    assert [segment for segment, _ in children(plan.tree)] == ["model", "progress"]
    *values, stream = [decode_value(json, file="golden") for json in manifest.values]
    assert repr(values) == repr(VALUES)  # repr tells 1 from 1.0 and True, and -0.0 from 0.0
    assert isinstance(stream, BytesIO)
    assert (stream.getvalue(), stream.tell()) == (b"abc", 2)
    assert decode_value(manifest.metadata, file="golden") == {"note": "hello"}


def test_writing_the_manifest_of_format_1() -> None:
    """From the same parts the same bytes are written."""
    manifest = decode_manifest(MANIFEST, file="golden")
    parts = {}
    for name in ("metadata", "values", "plan"):
        start = MANIFEST.index(f',"{name}":'.encode()) + len(name) + 4
        stop = {"metadata": b',"values":', "values": b',"plan":', "plan": b',"sum":'}[name]
        parts[name] = MANIFEST[start : MANIFEST.index(stop, start)]
    assert encode_manifest(manifest.head, manifest.files, **parts) == MANIFEST
