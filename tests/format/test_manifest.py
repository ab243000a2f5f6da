"""Manifests: there and back, and never believed further than they can be checked."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from aiockpt.errors import CheckpointCorruptError, ConfigError
from aiockpt.format.manifest import (
    FORMAT_VERSION,
    HEAD_NBYTES,
    FileRecord,
    Head,
    Plan,
    decode_manifest,
    encode_manifest,
    parse_head,
)
from aiockpt.format.names import MAX_STEP

HEAD = Head(
    step=3,
    term=1,
    ordinal=2,
    save_id="0b6f1c9e-5d2a-4f7e-9c1b-3a8d7e6f5c4b",
    world_size=1,
    nbytes=8,
    created="2026-01-02T03:04:05+00:00",
    package="0.1.0",
)
FILES = [
    FileRecord(path="m/model-00001-of-00001.safetensors", nbytes=4104, data_start=4096, sum="0" * 32),
    FileRecord(path="m/model.safetensors.index.json", nbytes=2, data_start=0, sum="1" * 32),
]
PLAN = Plan(
    classes=[("F32", [2], "")], names=["a"], entry_classes=[0], entry_files=[0], tree={"m": {"a": 0, "b": -1}, "n": -2}
)


def make(
    head: Head = HEAD,
    files: list[FileRecord] = FILES,
    plan: Plan = PLAN,
    *,
    values: bytes = b'[1,{"~tuple":[]}]',
    metadata: bytes = b"null",
) -> bytes:
    return encode_manifest(head, files, values=values, metadata=metadata, plan=msgspec.json.encode(plan))


SMALL = make()


def signed(body: bytes) -> bytes:
    """Return a manifest whose checksum is right, whatever its content."""
    return body + b',"sum":"%b"}' % xxhash.xxh3_128_hexdigest(body).encode()


def forged(change: Any) -> bytes:
    """Return the small manifest with its JSON changed by a function, and all checksums made right."""
    parts = msgspec.json.decode(SMALL)
    change(parts)
    head = json.dumps(parts.pop("head"), separators=(",", ":"))
    parts.pop("head_sum")
    parts.pop("sum")
    rest = "".join(f',"{name}":{msgspec.json.encode(part).decode()}' for name, part in parts.items())
    return signed(f'{{"head":{head},"head_sum":"{xxhash.xxh3_64_hexdigest(head.encode())}"{rest}'.encode())


def refused(data: bytes) -> CheckpointCorruptError:
    """Return the error of a manifest, after a look that it says what, why and next."""
    with pytest.raises(CheckpointCorruptError) as caught:
        decode_manifest(data, file="step-3/manifest.json")
    error = caught.value
    assert error.file == "step-3/manifest.json"
    assert "step-3/manifest.json" in error.what
    assert error.why
    assert error.next
    assert len(str(error)) < 2000
    return error


def test_forging_changes_nothing_by_itself() -> None:
    """The tests below break what they say and nothing else."""
    assert forged(lambda parts: None) == SMALL


def test_round_trip() -> None:
    """What was encoded is decoded."""
    manifest = decode_manifest(make(metadata=b'{"note":"x"}'), file="m")
    assert manifest.head == HEAD
    assert manifest.head.format == FORMAT_VERSION == 1
    assert manifest.files == FILES
    assert manifest.plan == PLAN
    assert manifest.values == [1, {"~tuple": []}]
    assert manifest.metadata == {"note": "x"}


NUMBERS = st.integers(0, MAX_STEP)
HEADS = st.builds(
    Head,
    step=NUMBERS,
    term=NUMBERS,
    ordinal=NUMBERS,
    save_id=st.uuids().map(str),
    world_size=NUMBERS,
    nbytes=NUMBERS,
    created=st.just(HEAD.created),
    package=st.sampled_from(["0.1.0", "12.34.56.dev789+gdeadbeef.d20260102"]),
)


@settings(max_examples=100, deadline=None)
@given(HEADS)
def test_head_from_the_first_bytes(head: Head) -> None:
    """A scan of a run reads 512 bytes of each manifest and knows its head, the longest too."""
    data = make(head)
    assert parse_head(data[:HEAD_NBYTES], file="m") == head
    assert parse_head(data, file="m") == decode_manifest(data, file="m").head == head


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_columns_round_trip(data: st.DataObject) -> None:
    """Any plan with columns that fit comes back."""
    classes = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from(["F32", "U8"]), st.lists(st.integers(0, 9), max_size=3), st.sampled_from(["", "C128"])
            ),
            min_size=1,
            max_size=3,
        )
    )
    names = data.draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=6), max_size=5))
    column = st.lists(st.integers(0, len(classes) - 1), min_size=len(names), max_size=len(names))
    plan = Plan(
        classes=classes,
        names=names,
        entry_classes=data.draw(column),
        entry_files=[i % 2 for i in range(len(names))],
        tree={str(i): i for i in range(len(names))},
    )
    assert decode_manifest(make(plan=plan), file="m").plan == plan


@pytest.mark.parametrize("length", range(len(SMALL)))
def test_truncated(length: int) -> None:
    """A manifest that ends anywhere before its end is corrupt."""
    refused(SMALL[:length])


@pytest.mark.parametrize("more", [b"\0", b" ", b"\n", b"}", SMALL])
def test_longer(more: bytes) -> None:
    """So is one that goes on behind it."""
    refused(SMALL + more)


def test_bit_flips() -> None:
    """Any one flipped bit anywhere is found, none is taken for a newer format."""
    for bit in range(8 * len(SMALL)):
        flipped = bytearray(SMALL)
        flipped[bit // 8] ^= 1 << bit % 8
        refused(bytes(flipped))


def test_bit_flips_in_a_head() -> None:
    """A scan does not believe a head with a flipped bit."""
    head_nbytes = SMALL.index(b',"files"')
    for bit in range(8 * head_nbytes):
        flipped = bytearray(SMALL[:HEAD_NBYTES])
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CheckpointCorruptError):
            parse_head(bytes(flipped), file="m")


def test_the_checksum_is_named() -> None:
    """Both checksums are in fields."""
    flipped = SMALL.replace(b'"values":[1,', b'"values":[7,')
    error = refused(flipped)
    assert error.expected == SMALL[-34:-2].decode()
    assert error.found == xxhash.xxh3_128_hexdigest(flipped[:-42])
    assert error.offset == 0


@pytest.mark.parametrize("data", [b"", b"{}", b"null", b"\0" * 4096, b'{"head":', b"\xff" * 600, b'{"head":{}}'])
def test_no_manifest(data: bytes) -> None:
    """What is none at all."""
    refused(data)
    with pytest.raises(CheckpointCorruptError):
        parse_head(data, file="m")


def newer(parts: dict[str, Any]) -> None:
    parts["head"]["format"] = FORMAT_VERSION + 1


@pytest.mark.parametrize(
    "data",
    [
        forged(newer),
        forged(lambda parts: parts["head"].update(format=99, step="three", more=[1])),
        b'{"head":{"format":2,"what":"another shape of head"},"body":1}',
    ],
    ids=["by one", "other fields", "without a sum"],
)
def test_newer_format(data: bytes) -> None:
    """A checkpoint of a newer aiockpt is not corrupt: the error says to upgrade, from the first bytes already."""
    for read in (decode_manifest, parse_head):
        with pytest.raises(ConfigError, match="newer aiockpt") as caught:
            read(data[:HEAD_NBYTES] if read is parse_head else data, file="step-3/manifest.json")
        assert caught.value.path == "step-3/manifest.json"
        assert "upgrade" in caught.value.next


def set_head(**fields: Any) -> Any:
    return lambda parts: parts["head"].update(fields)


def set_plan(**fields: Any) -> Any:
    return lambda parts: parts["plan"].update(fields)


def set_file(**fields: Any) -> Any:
    return lambda parts: parts["files"][0].update(fields)


HOSTILE: dict[str, Any] = {
    "format 0": set_head(format=0),
    "format is text": set_head(format="1"),
    "format is true": set_head(format=True),
    "negative step": set_head(step=-1),
    "huge step": set_head(step=1 << 63),
    "very huge step": set_head(step=10**4000),
    "float step": set_head(step=3.0),
    "negative ordinal": set_head(ordinal=-1),
    "negative term": set_head(term=-1),
    "save id with a path": set_head(save_id="../../x"),
    "save id is empty": set_head(save_id=""),
    "save id with a newline": set_head(save_id="ab\n"),
    "save id too long": set_head(save_id="a" * 65),
    "no save id": lambda parts: parts["head"].pop("save_id"),
    "head is a list": lambda parts: parts.update(head=[]),
    "head is null": lambda parts: parts.update(head=None),
    "no files": lambda parts: parts.pop("files"),
    "files is null": lambda parts: parts.update(files=None),
    "no values": lambda parts: parts.pop("values"),
    "values is an object": lambda parts: parts.update(values={}),
    "no metadata": lambda parts: parts.pop("metadata"),
    "no plan": lambda parts: parts.pop("plan"),
    "names too short": set_plan(names=[]),
    "names too long": set_plan(names=["a", "b"]),
    "names are numbers": set_plan(names=[1]),
    "classes too short": set_plan(entry_classes=[]),
    "class is not there": set_plan(entry_classes=[1]),
    "class is negative": set_plan(entry_classes=[-1]),
    "class is huge": set_plan(entry_classes=[1 << 80]),
    "file is not there": set_plan(entry_files=[2]),
    "file is negative": set_plan(entry_files=[-1]),
    "file is a float": set_plan(entry_files=[0.0]),
    "unknown dtype": set_plan(classes=[["F33", [2], ""]]),
    "negative shape": set_plan(classes=[["F32", [-2], ""]]),
    "huge shape": set_plan(classes=[["F32", [1 << 62, 1 << 62], ""]]),
    "half a byte": set_plan(classes=[["F4", [1], ""]]),
    "class without a mark": set_plan(classes=[["F32", [2]]]),
    "tree names an entry that is not there": set_plan(tree={"m": {"a": 1}}),
    "tree names a value that is not there": set_plan(tree={"m": {"a": -3}}),
    "tree is null": set_plan(tree=None),
    "tree has text": set_plan(tree={"a": "b"}),
    "tree has a bool": set_plan(tree={"a": True}),
    "tree has a float": set_plan(tree={"a": 0.0}),
    "tree has an unknown tag": set_plan(tree={"a": ["object", {}]}),
    "module without items": set_plan(tree=["module", 5, None]),
    "blob of a value": set_plan(tree={"a": ["bytes", -1]}),
    "no tree": lambda parts: parts["plan"].pop("tree"),
    "absolute path": set_file(path="/etc/passwd"),
    "path upwards": set_file(path="../x"),
    "path upwards inside": set_file(path="m/../../x"),
    "path with a dot": set_file(path="m/./x"),
    "empty path": set_file(path=""),
    "path of a folder": set_file(path="m/"),
    "path with two slashes": set_file(path="m//x"),
    "path with a zero byte": set_file(path="m/x\0y"),
    "path twice": set_file(path="m/model.safetensors.index.json"),
    "negative size": set_file(nbytes=-1),
    "huge size": set_file(nbytes=1 << 63),
    "data behind the end": set_file(data_start=8192),
    "data at an odd place": set_file(data_start=4000),
    "negative start": set_file(data_start=-4096),
    "no sum": lambda parts: parts["files"][0].pop("sum"),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile(change: Any) -> None:
    """Manifests with right checksums and false content, one by one."""
    refused(forged(change))


def test_two_heads() -> None:
    """A manifest whose head a scan and a JSON parser see differently."""
    second = msgspec.json.encode(msgspec.structs.replace(HEAD, step=4))
    refused(signed(SMALL[:-42] + b',"head":' + second))


@pytest.mark.parametrize("depth", [900, 100_000])
@pytest.mark.parametrize("part", ["values", "plan", "metadata"])
def test_deep_nesting(part: str, depth: int) -> None:
    """Nesting ends neither the process nor in another error."""
    deep = b"[" * depth + b"]" * depth
    plan = msgspec.json.encode(PLAN)
    parts = {"values": b"[]", "metadata": b"null", "plan": plan}
    if part == "plan":
        parts["plan"] = plan.replace(b'"b":-1', b'"b":' + b'{"k":' * depth + b"-1" + b"}" * depth)
    else:
        parts[part] = deep
    data = encode_manifest(HEAD, FILES, **parts)
    if part == "metadata" and depth == 900:  # within Python's stack; decode_value refuses it
        return
    refused(data)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_mutations(data: st.DataObject) -> None:
    """Bytes changed anywhere under a right checksum give a manifest or one of two errors, nothing else."""
    body = bytearray(SMALL[:-42])
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(SMALL.index(b',"files"'), len(body)))
        stop = data.draw(st.integers(start, min(start + 8, len(body))))
        body[start:stop] = data.draw(
            st.binary(max_size=8) | st.sampled_from([b"[", b"{", b'"', b"-1", b"1e9", b"null"])
        )
    try:
        decode_manifest(signed(bytes(body)), file="m")
    except (CheckpointCorruptError, ConfigError):
        return


@pytest.mark.parametrize(
    "fields",
    [{"step": -1}, {"step": 1 << 63}, {"save_id": "X"}, {"save_id": "a/b"}, {"package": "x" * 512}, {"format": 0}],
    ids=str,
)
def test_heads_that_nobody_could_read(fields: dict[str, Any]) -> None:
    """A writer refuses them before the commit."""
    with pytest.raises(ValueError, match=r"."):
        make(msgspec.structs.replace(HEAD, **fields))


def test_unknown_fields_are_accepted() -> None:
    """Within a format version records may grow."""

    def grow(parts: dict[str, Any]) -> None:
        parts["head"]["host"] = "a"
        parts["files"][0]["stripes"] = 2
        parts["plan"]["meshes"] = []
        parts["notes"] = {}

    assert decode_manifest(forged(grow), file="m") == decode_manifest(SMALL, file="m")
