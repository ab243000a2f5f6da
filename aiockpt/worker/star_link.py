"""One connection of the star, from either end: proof first, then frames; no write ever waits.

On asyncio's transports instead of anyio's streams: a send in a loop over 4,000 members takes a third of the time.
"""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from typing import ClassVar, Protocol, cast

from aiockpt.errors import ProtocolError
from aiockpt.protocol import proof
from aiockpt.protocol.frames import MAX_FRAME_NBYTES, StarDecoder, encode
from aiockpt.protocol.star import StarMessage

__all__ = ["HubEnd", "LinkOwner", "MemberEnd", "StarLink"]

JOIN_NBYTES = 4096
"""Of the first frame that a hub takes."""
BACKLOG_NBYTES = 64 << 20
"""That may wait for one that does not read; beyond that it counts as lost. Four of the largest frames."""


class LinkOwner(Protocol):
    """Whoever the connection serves; every method is called in the loop and returns at once."""

    def link_made(self, link: StarLink) -> None:
        """The connection stands, and nothing is known of the other end."""

    def link_up(self, link: StarLink) -> None:
        """Both ends have proved that they know the token."""

    def link_says(self, link: StarLink, message: StarMessage) -> None:
        """A message came."""

    def link_down(self, link: StarLink, why: str) -> None:
        """The connection is over; called once, also where it was never up."""


class StarLink(asyncio.Protocol, ABC):
    """What both ends share. Belongs to the transport; it ends with that."""

    JOIN_SECONDS: ClassVar[float]
    """From the connection until the member is in."""

    def __init__(self, owner: LinkOwner, token: bytes) -> None:
        self._owner = owner
        self._token = token
        self._transport: asyncio.Transport | None = None
        self._challenged = b""
        self._answered = b""
        self._unread = b""
        """What came of the proof."""
        self._is_up = False
        self._decoder = StarDecoder()
        self._deadline: asyncio.TimerHandle | None = None
        self._why = "the other end closed it"
        self.rank: int | None = None
        """Of the member, once the hub has taken it in."""
        self.peer = ""
        """The other end's address, for the log."""
        self.silence = 0.0
        """Seconds, as the owner counts them, since anything came."""

    # ---- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        self._transport = cast("asyncio.Transport", transport)
        name = transport.get_extra_info("peername")
        self.peer = f"{name[0]}:{name[1]}" if name else "nowhere"
        self._expect(self.JOIN_SECONDS, f"it did not join within {self.JOIN_SECONDS:g} s")
        self._owner.link_made(self)
        self._begin()

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        self.silence = 0.0
        if self._is_closing:
            return
        if not self._is_up:
            self._unread += data
            self._prove()
            return  # no honest end says more before it has read the answer
        try:
            for message in self._decoder.feed(data):
                if self._is_closing:
                    return
                self._owner.link_says(self, message)
        except ProtocolError as exc:
            self.drop(f"it sends no frames of ours: {exc.why}")

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._expect(None)
        self._transport = None
        self._owner.link_down(self, self._why if exc is None else str(exc))

    # ---- for the owner

    def settled(self) -> None:
        """The member is in: no deadline any more, and frames of every size."""
        self._expect(None)
        self._decoder.max_frame_nbytes = MAX_FRAME_NBYTES

    def send(self, message: StarMessage) -> None:
        """Send a message, or drop it where the connection is over."""
        self.send_frame(encode(message))

    def send_frame(self, frame: bytes) -> None:
        """Send a message that is a frame already: one encoding serves thousands of members."""
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(frame)
        if self._transport.get_write_buffer_size() > BACKLOG_NBYTES:
            self.drop("it does not read")

    def drop(self, why: str) -> None:
        """End the connection now; what waits to be sent is lost."""
        if self._transport is not None:
            if not self._transport.is_closing():
                self._why = why
            self._transport.abort()

    def finish(self, message: StarMessage, why: str) -> None:
        """Send a last message and end the connection, soon also where the other end does not read."""
        self.send(message)
        if not self._is_closing:
            self._why = why
            self._expect(self.JOIN_SECONDS, why)
            cast("asyncio.Transport", self._transport).close()

    # ---- inside

    @property
    def _is_closing(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    @abstractmethod
    def _begin(self) -> None:
        """Say the first bytes, where they are ours to say."""

    @abstractmethod
    def _prove(self) -> None:
        """Go on with the proof as far as ``_unread`` goes."""

    def _expect(self, seconds: float | None, why: str = "") -> None:
        """Drop the connection after so many seconds, in place of what was expected before."""
        if self._deadline is not None:
            self._deadline.cancel()
        loop = asyncio.get_running_loop()
        self._deadline = None if seconds is None else loop.call_later(seconds, self.drop, why)

    def _take(self, nbytes: int) -> bytes | None:
        """Return the next part of the proof when all of it is there, and nothing behind it."""
        if len(self._unread) > nbytes:
            self.drop("it sends something else than a proof")
        if len(self._unread) != nbytes:
            return None
        taken, self._unread = self._unread, b""
        return taken

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _proved(self) -> None:
        self._is_up = True
        self._owner.link_up(self)


class HubEnd(StarLink):
    """The hub's end: challenges whoever connects."""

    JOIN_SECONDS = 5.0
    """A stranger holds a descriptor no longer."""

    def _begin(self) -> None:
        self._decoder.max_frame_nbytes = JOIN_NBYTES
        self._challenged = proof.challenge(os.urandom(proof.NONCE_NBYTES))
        self._write(self._challenged)

    def _prove(self) -> None:
        answered = self._take(proof.ANSWER_NBYTES)
        if answered is None:
            return
        confirmed = proof.confirm(self._token, self._challenged, answered)
        if confirmed is None:
            self.drop("it does not know the token of this job")
            return
        self._write(confirmed)
        self._proved()


class MemberEnd(StarLink):
    """The member's end: answers the challenge, then has the hub prove itself."""

    JOIN_SECONDS = 20.0
    """A hub that takes in thousands at once needs a while for each."""

    def _begin(self) -> None:
        return  # the hub speaks first

    def _prove(self) -> None:
        if not self._challenged:
            challenged = self._take(proof.CHALLENGE_NBYTES)
            if challenged is None:
                return
            if not proof.is_challenge(challenged):
                self.drop("nobody of ours listens there")
                return
            self._challenged = challenged
            self._answered = proof.answer(self._token, challenged, os.urandom(proof.NONCE_NBYTES))
            self._why = "it does not take our token"
            self._write(self._answered)
        elif (confirmed := self._take(proof.PROOF_NBYTES)) is not None:
            if not proof.is_confirmed(self._token, self._answered, confirmed):
                self.drop("it does not know the token of this job")
                return
            self._why = "the other end closed it"
            self._proved()
