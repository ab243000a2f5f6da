"""Frames: a little-endian ``u32`` length, then that many bytes of msgpack."""

from __future__ import annotations

import struct
from typing import Generic, TypeVar

import msgspec

from aiockpt.errors import ProtocolError
from aiockpt.protocol.messages import MAGIC, PROTOCOL_VERSION, Hello, Message
from aiockpt.protocol.star import StarMessage

__all__ = ["MAX_FRAME_NBYTES", "FrameDecoder", "StarDecoder", "check_hello", "encode"]

MAX_FRAME_NBYTES = 16 << 20
"""Checked before anything is allocated. The largest honest frame is EndStaging with 8 MiB of values."""

_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)
_star_decoder = msgspec.msgpack.Decoder(StarMessage)

T = TypeVar("T")


def encode(message: Message | StarMessage) -> bytes:
    """Return the frame of one message.

    Raises:
        ProtocolError: It is larger than ``MAX_FRAME_NBYTES``, or holds an int beyond 64 bits or text that is no
            UTF-8; nothing was sent.
    """
    frame = bytearray(_LENGTH.size)
    try:
        _encoder.encode_into(message, frame, _LENGTH.size)
    except (OverflowError, UnicodeEncodeError) as exc:
        raise ProtocolError(
            f"a {type(message).__name__} was not sent", why=str(exc), next="report this: it was not checked before"
        ) from exc
    nbytes = len(frame) - _LENGTH.size
    if nbytes > MAX_FRAME_NBYTES:
        raise ProtocolError(
            f"a {type(message).__name__} of {nbytes} bytes was not sent",
            why=f"a frame has at most {MAX_FRAME_NBYTES} bytes",
            next="report this: bulk bytes belong into the arena",
        )
    _LENGTH.pack_into(frame, 0, nbytes)
    return bytes(frame)


class _Decoder(Generic[T]):
    """Cuts a byte stream into messages; holds at most one frame that is not whole yet.

    After a ProtocolError the stream has no meaning any more, and every later ``feed`` raises it again.
    """

    def __init__(self, decoder: msgspec.msgpack.Decoder[T], max_frame_nbytes: int) -> None:
        self._decoder = decoder
        self.max_frame_nbytes = max_frame_nbytes
        """Of the frames that follow; may be changed between two."""
        self._buffer = bytearray()
        self._broken: ProtocolError | None = None

    def feed(self, data: bytes) -> list[T]:
        """Take bytes as they come and return the messages that they complete.

        Whole messages in front of a bad one in the same bytes are dropped with it: the connection ends here anyway.

        Raises:
            ProtocolError: A length over the limit, bytes that are no msgpack, an unknown tag, or a wrong field.
        """
        if self._broken is not None:
            raise self._broken.copy()
        self._buffer += data
        messages: list[T] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (nbytes,) = _LENGTH.unpack_from(self._buffer, start)
            if nbytes > self.max_frame_nbytes:
                raise self._break(f"it announces {nbytes} bytes, more than {self.max_frame_nbytes}")
            stop = start + _LENGTH.size + nbytes
            if len(self._buffer) < stop:
                break
            try:
                with memoryview(self._buffer)[start + _LENGTH.size : stop] as body:
                    messages.append(self._decoder.decode(body))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
                raise self._break(str(exc)) from exc
            start = stop
        del self._buffer[:start]
        return messages

    @property
    def pending_nbytes(self) -> int:
        """Bytes of a frame that is not whole yet; at end of stream anything but 0 means that it was cut."""
        return len(self._buffer)

    def _break(self, why: str) -> ProtocolError:
        self._buffer.clear()
        self._broken = ProtocolError(
            "a frame was not understood", why=why, next="the connection is dropped and the worker replaced"
        )
        return self._broken


class FrameDecoder(_Decoder[Message]):
    """Of what trainer and worker say to each other."""

    def __init__(self) -> None:
        super().__init__(_decoder, MAX_FRAME_NBYTES)


class StarDecoder(_Decoder[StarMessage]):
    """Of what workers say to each other; larger frames are refused before they are taken in."""

    def __init__(self, max_frame_nbytes: int = MAX_FRAME_NBYTES) -> None:
        super().__init__(_star_decoder, max_frame_nbytes)


def check_hello(message: Message, *, package: str, path: str) -> Hello:
    """Return the peer's first message if it is a Hello that fits ours.

    Raises:
        ProtocolError: Names what differs.
    """
    if not isinstance(message, Hello):
        raise ProtocolError(
            "the peer did not say hello",
            why=f"its first message is a {type(message).__name__}",
            next="the connection is dropped",
        )
    ours = {"magic": MAGIC, "protocol": PROTOCOL_VERSION, "package": package, "path": path}
    for field, expected in ours.items():
        found = getattr(message, field)
        if found != expected:
            raise ProtocolError(
                f"the peer's {field} is {found!r}, ours is {expected!r}",
                why="trainer and worker run different installations of aiockpt",
                next="install one version, and restart the trainer after an upgrade",
            )
    return message
