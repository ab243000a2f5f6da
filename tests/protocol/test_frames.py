"""Frames: cut anywhere, garbage of every kind, and the first message."""

from __future__ import annotations

import itertools
import re
import struct
import tracemalloc
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiockpt.errors import ProtocolError
from aiockpt.protocol.frames import MAX_FRAME_NBYTES, FrameDecoder, check_hello, encode
from aiockpt.protocol.messages import (
    MAGIC,
    PROTOCOL_VERSION,
    EndStaging,
    Failed,
    Hello,
    Message,
    Reserve,
    Staged,
)
from aiockpt.protocol.terms import WireError
from tests.protocol.examples import EXAMPLES, SAVE_ID

EVERY = pytest.mark.parametrize("message", EXAMPLES.values(), ids=EXAMPLES.keys())
STREAM = b"".join(map(encode, EXAMPLES.values()))


def framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def framed_fields(**fields: Any) -> bytes:
    """Return a frame of a message that need not be one; ``is_`` is its tag."""
    return framed(msgspec.msgpack.encode({"is": fields.pop("is_"), **fields}))


def refused(data: bytes) -> ProtocolError:
    """Return the error that the bytes are answered with, after a look that it says what, why and next."""
    with pytest.raises(ProtocolError) as caught:
        FrameDecoder().feed(data)
    assert caught.value.what
    assert caught.value.why
    assert caught.value.next
    return caught.value


@EVERY
def test_round_trip(message: Message) -> None:
    """Every message comes back as it was."""
    assert FrameDecoder().feed(encode(message)) == [message]


def test_examples_have_every_message() -> None:
    """A new message is tested by being in the union."""
    assert {type(message) for message in EXAMPLES.values()} == set(typing.get_args(Message))


@EVERY
def test_cut_at_every_byte(message: Message) -> None:
    """A frame in two parts gives nothing at the first and the message at the second, wherever it is cut."""
    frame = encode(message)
    for cut in range(1, len(frame)):
        decoder = FrameDecoder()
        assert decoder.feed(frame[:cut]) == []
        assert decoder.pending_nbytes == cut
        assert decoder.feed(frame[cut:]) == [message]
        assert decoder.pending_nbytes == 0


def test_one_byte_at_a_time() -> None:
    """A stream that drips gives the same messages, each with its last byte."""
    decoder = FrameDecoder()
    messages = [message for byte in STREAM for message in decoder.feed(bytes([byte]))]
    assert messages == list(EXAMPLES.values())
    assert decoder.pending_nbytes == 0


def test_all_at_once() -> None:
    """Many frames in one read come out in their order; what is not whole stays for later."""
    decoder = FrameDecoder()
    assert decoder.feed(STREAM + STREAM[:7]) == list(EXAMPLES.values())
    assert decoder.pending_nbytes == 7
    assert decoder.feed(STREAM[7:]) == list(EXAMPLES.values())
    assert decoder.feed(b"") == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, len(STREAM)), max_size=30).map(sorted))
def test_cut_anywhere(cuts: list[int]) -> None:
    """However a stream is cut, the messages are the same."""
    decoder = FrameDecoder()
    edges = [0, *cuts, len(STREAM)]
    parts = [STREAM[a:b] for a, b in itertools.pairwise(edges)]
    assert [message for part in parts for message in decoder.feed(part)] == list(EXAMPLES.values())


@EVERY
def test_trailing_bytes_in_a_frame(message: Message) -> None:
    """A frame that is longer than its message is no frame."""
    refused(framed(encode(message)[4:] + b"\xc0"))


@EVERY
def test_frame_shorter_than_its_message(message: Message) -> None:
    """A frame that ends inside its message is no frame."""
    body = encode(message)[4:]
    for length in range(len(body)):
        refused(framed(body[:length]))


GARBAGE = {
    "empty frame": framed(b""),
    "no msgpack": framed(b"\xc1"),
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "json": framed(b'{"is":"close"}'),
    "an int": framed(b"\x05"),
    "an array": framed(msgspec.msgpack.encode(["close"])),
    "no tag": framed(msgspec.msgpack.encode({})),
    "tag is a number": framed_fields(is_=5),
    "unknown tag": framed_fields(is_="reload"),
    "tag of another case": framed_fields(is_="Close"),
    "field missing": framed_fields(is_="staged", save_id=SAVE_ID, file=0),
    "float for int": framed_fields(is_="reserve", nbytes=1.0),
    "bool for int": framed_fields(is_="reserve", nbytes=True),
    "text for int": framed_fields(is_="reserve", nbytes="1"),
    "nil for int": framed_fields(is_="reserve", nbytes=None),
    "bytes for text": framed_fields(is_="cancel", save_id=b"x"),
    "text for bytes": framed_fields(is_="end", save_id=SAVE_ID, values=[], metadata=b""),
    "negative size": framed_fields(is_="reserve", nbytes=-1),
    "negative index": framed_fields(is_="staged", save_id=SAVE_ID, file=-1, upto=1),
    "negative offset": framed_fields(is_="staged", save_id=SAVE_ID, file=0, upto=-4096),
    "negative descriptors": framed_fields(is_="adopt", nbytes=1, fds=-1),
    "unknown kind of error": framed_fields(is_="failed", save_id=SAVE_ID, error={"kind": "odd", "what": "x"}),
    "wrong type deep inside": framed_fields(is_="failed", save_id=SAVE_ID, error={"kind": "storage", "what": 1}),
    "key that is no text": framed(b"\x82\xa2is\xa5close\x01\x02"),
    "key that is an array": framed(b"\x82\xa2is\xa5close\x91\x01\x02"),
    "text that is no UTF-8": framed(b"\x82\xa2is\xa6cancel\xa7save_id\xa2\xff\xfe"),
    "deep nesting": framed(b"\x82\xa2is\xa5close\xa1x" + b"\x91" * 1_000_000 + b"\xc0"),
    "array that is not there": framed(b"\x82\xa2is\xa5begin\xa5files\xdd\xff\xff\xff\xff"),
    "map that is not there": framed(b"\x82\xa2is\xa9committed\xa7timings\xdf\xff\xff\xff\xff"),
    "bytes that are not there": framed(b"\x82\xa2is\xa3end\xa6values\xc6\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage(data: bytes) -> None:
    """Bytes that are no message are a ProtocolError, whatever is wrong with them."""
    refused(data)


@pytest.mark.parametrize("name", ["array that is not there", "map that is not there", "bytes that are not there"])
def test_claims_inside_a_frame_allocate_nothing(name: str) -> None:
    """A container that claims 4 G items in a frame of some bytes costs some bytes."""
    tracemalloc.start()
    try:
        refused(GARBAGE[name])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize("nbytes", [MAX_FRAME_NBYTES + 1, 1 << 31, (1 << 32) - 1])
def test_huge_length(nbytes: int) -> None:
    """A length over the limit is refused when its four bytes are there, and nothing is allocated for it."""
    tracemalloc.start()
    try:
        error = refused(struct.pack("<I", nbytes))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(nbytes) in error.why
    assert peak < 100_000


def test_a_length_alone_allocates_nothing() -> None:
    """The largest length that is taken is believed when its bytes come, not before."""
    decoder = FrameDecoder()
    tracemalloc.start()
    try:
        assert decoder.feed(struct.pack("<I", MAX_FRAME_NBYTES) + b"\x82") == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bodies(body: bytes) -> None:
    """Random bytes are a message or a ProtocolError, nothing else."""
    try:
        messages = FrameDecoder().feed(framed(body))
    except ProtocolError:
        return
    assert len(messages) == 1


@EVERY
def test_bit_flips(message: Message) -> None:
    """Any one flipped bit gives messages, a wait for more, or a ProtocolError, nothing else."""
    frame = encode(message)
    for bit in range(8 * len(frame)):
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            FrameDecoder().feed(bytes(flipped))
        except ProtocolError:
            continue


def test_broken_stays_broken() -> None:
    """After garbage the stream has no meaning: good frames behind it are refused by an error of their own."""
    decoder = FrameDecoder()
    with pytest.raises(ProtocolError) as first:
        decoder.feed(framed(b"\xc1"))
    assert decoder.pending_nbytes == 0
    for data in (encode(EXAMPLES["close"]), b""):
        with pytest.raises(ProtocolError) as again:
            decoder.feed(data)
        assert str(again.value) == str(first.value)
        assert again.value is not first.value


@EVERY
def test_unknown_fields_are_accepted(message: Message) -> None:
    """A newer peer may say more: fields that are not known are passed over."""
    fields = msgspec.to_builtins(message, builtin_types=(bytes,)) | {"since_2": {"a": [1, None, b"x"]}, "zzz": 1.5}
    assert FrameDecoder().feed(framed(msgspec.msgpack.encode(fields))) == [message]


def test_nested_unknown_fields_are_accepted() -> None:
    """The records inside messages may grow too."""
    message = EXAMPLES["begin"]
    fields = msgspec.to_builtins(message)
    fields["files"][0]["stripes"] = 4
    assert FrameDecoder().feed(framed(msgspec.msgpack.encode(fields))) == [message]


@EVERY
def test_messages_are_frozen(message: Message) -> None:
    """A message that was decoded is a fact."""
    for field in message.__struct_fields__[:1]:
        with pytest.raises(AttributeError):
            setattr(message, field, None)


def test_largest_honest_frame() -> None:
    """Values of 8 MiB, the most that a rank may have, travel in one frame."""
    message = EndStaging(save_id=SAVE_ID, values=b"x" * (8 << 20), metadata=b"y" * (7 << 20))
    decoder = FrameDecoder()
    frame = encode(message)
    parts = [frame[i : i + (1 << 16)] for i in range(0, len(frame), 1 << 16)]
    assert [found for part in parts for found in decoder.feed(part)] == [message]


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (EndStaging(save_id=SAVE_ID, values=b"x" * MAX_FRAME_NBYTES, metadata=b""), "at most 16777216 bytes"),
        (Staged(save_id=SAVE_ID, file=0, upto=1 << 64), "serialize ints"),
        (Failed(save_id="\udc80", error=WireError(kind="internal", what="x")), "surrogates"),
    ],
    ids=["too large", "int too large", "no UTF-8"],
)
def test_what_is_not_sent(message: Message, why: str) -> None:
    """A message that the peer could not read is refused by its sender, before a byte is out."""
    with pytest.raises(ProtocolError) as caught:
        encode(message)
    assert type(message).__name__ in caught.value.what
    assert caught.value.next
    assert re.search(why, caught.value.why)


def hello(**changes: Any) -> Hello:
    return Hello(**({"magic": MAGIC, "protocol": PROTOCOL_VERSION, "package": "0.1.0", "path": "/p"} | changes))


def test_hello_that_fits() -> None:
    """Equal installations understand each other; the setup is no part of that."""
    message = EXAMPLES["hello"]
    assert isinstance(message, Hello)
    assert check_hello(message, package="0.1.0", path="/site-packages/aiockpt") is message


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (hello(magic="torch"), "magic"),
        (hello(protocol=2), "protocol"),
        (hello(protocol=0), "protocol"),
        (hello(package="0.2.0"), "package"),
        (hello(path="/other"), "path"),
        (Reserve(nbytes=1), "hello"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hello_that_does_not_fit(message: Message, named: str) -> None:
    """Another version, another installation, or no hello at all: a ProtocolError that names what differs."""
    with pytest.raises(ProtocolError, match=named) as caught:
        check_hello(message, package="0.1.0", path="/p")
    assert caught.value.why
    assert caught.value.next
