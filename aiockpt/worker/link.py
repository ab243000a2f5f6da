"""One end of the socket between trainer and worker: frames and descriptors in, frames and descriptors out."""

from __future__ import annotations

import array
import os
import select
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable

import anyio
import anyio.abc

from aiockpt.errors import ProtocolError
from aiockpt.protocol.frames import FrameDecoder, encode
from aiockpt.protocol.messages import Message

__all__ = ["Link"]

_READ_NBYTES = 256 << 10
_MAX_FDS = 8
"""Unclaimed at one time; an honest trainer has one on its way at most. The kernel drops what a read does not take."""


class Link:
    """Owns the socket, and the descriptors that arrived and were not claimed yet."""

    def __init__(self, sock: socket.socket, stream: anyio.abc.UNIXSocketStream) -> None:
        self._socket = sock
        self._stream = stream
        self._decoder = FrameDecoder()
        self._fds: deque[int] = deque()
        self._outbox: deque[tuple[bytes, int | None]] = deque()
        self._more = anyio.Event()
        self._quiet = anyio.Event()
        self._is_muted = False
        self._is_sending = False

    @classmethod
    async def wrap(cls, fd: int) -> Link:
        """Take over a connected stream socket."""
        sock = socket.socket(fileno=fd)
        sock.set_inheritable(False)
        return cls(sock, await anyio.abc.UNIXSocketStream.from_socket(sock))

    # ---- in

    async def receive(self) -> AsyncIterator[tuple[Message, list[int]]]:
        """Yield each message with the descriptors that it claims (they become the caller's), until the end.

        Raises:
            ProtocolError: The bytes are no frames, or descriptors are missing or too many.
        """
        while True:
            try:
                data, fds = await self._stream.receive_fds(_READ_NBYTES, _MAX_FDS)
            except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                return
            for item in self._take(data, fds):
                yield item

    @property
    def has_unread(self) -> bool:
        """Whether something came that ``receive`` had no turn for yet."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def drain(self, handle: Callable[[Message, list[int]], None]) -> None:
        """Handle what a trainer that is gone had sent; nobody may be in ``receive``. Does not wait.

        Raises:
            ProtocolError: As ``receive``.
        """
        while True:
            try:
                data, control, _, _ = self._socket.recvmsg(_READ_NBYTES, socket.CMSG_SPACE(_MAX_FDS * 4))
            except OSError:  # nothing left, or the trainer's end was closed with our frames unread
                return
            if not data:
                return
            fds = array.array("i")
            for _, _, payload in control:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
            for message, claimed in self._take(data, list(fds)):
                handle(message, claimed)

    def _take(self, data: bytes, fds: list[int]) -> list[tuple[Message, list[int]]]:
        for fd in fds:
            os.set_inheritable(fd, False)
        self._fds.extend(fds)
        items = [(message, self._claim(getattr(message, "fds", 0))) for message in self._decoder.feed(data)]
        if len(self._fds) > _MAX_FDS:
            raise ProtocolError(
                "descriptors arrived that no frame claims",
                why=f"more than {_MAX_FDS} wait",
                next="the connection is dropped and the worker replaced",
            )
        return items

    def _claim(self, count: int) -> list[int]:
        if not 0 <= count <= len(self._fds):
            raise ProtocolError(
                f"a frame claims {count} descriptors, {len(self._fds)} arrived",
                why="a descriptor comes with the first byte of its frame, or not at all",
                next="the connection is dropped and the worker replaced",
            )
        return [self._fds.popleft() for _ in range(count)]

    # ---- out

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits to be sent, or nobody reads it."""
        return self._is_muted or not (self._outbox or self._is_sending)

    def send(self, message: Message, fd: int | None = None) -> None:
        """Queue a message, with at most one descriptor, which becomes the link's.

        The queue is bounded by its callers: a few frames a save, and no beat while anything waits.
        """
        if self._is_muted:
            if fd is not None:
                os.close(fd)
            return
        self._outbox.append((encode(message), fd))
        self._more.set()

    def mute(self) -> None:
        """Drop what waits and all that comes: nobody will read it."""
        self._is_muted = True
        while self._outbox:
            _, fd = self._outbox.popleft()
            if fd is not None:
                os.close(fd)
        self._quiet.set()

    async def run_sender(self) -> None:
        """Send what is queued until cancelled, or until the trainer is gone."""
        while True:
            while self._outbox:
                data, fd = self._outbox.popleft()
                self._is_sending = True
                try:
                    await self._send(data, fd)
                except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                    self.mute()
                finally:
                    self._is_sending = False
                    if fd is not None:
                        os.close(fd)
            self._quiet.set()
            self._quiet = anyio.Event()
            self._more = anyio.Event()
            await self._more.wait()

    async def wait_idle(self) -> None:
        """Wait until all is sent; bound it, the trainer may not read."""
        while not self.is_idle:
            await self._quiet.wait()

    async def aclose(self) -> None:
        """Close the socket, and what arrived unclaimed; what waits to be sent is dropped."""
        self.mute()
        while self._fds:
            os.close(self._fds.popleft())
        await anyio.aclose_forcefully(self._stream)

    def forget_in_child(self) -> None:
        """In a forked child: close what was inherited, without a word to the peer."""
        os.close(self._socket.detach())
        while self._fds:
            os.close(self._fds.popleft())

    async def _send(self, data: bytes, fd: int | None) -> None:
        if fd is not None:
            # One byte with the descriptor: a longer send may be cut, and anyio repeats the descriptor with the rest.
            await self._stream.send_fds(data[:1], [fd])
            data = data[1:]
        await self._stream.send(data)
