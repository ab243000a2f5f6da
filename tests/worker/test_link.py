"""The socket's two ends, with frames and descriptors, in one process."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio
import anyio.lowlevel
import pytest

from aiockpt.errors import ProtocolError
from aiockpt.protocol.frames import encode
from aiockpt.protocol.messages import Adopt, Beat, Cancel, EndStaging, Message
from aiockpt.worker.link import Link

pytestmark = pytest.mark.process  # for the check that no descriptor is left


def run(body: Callable[[Link, Link], Awaitable[None]]) -> None:
    """Run ``body`` with both ends, their senders at work."""

    @contextlib.asynccontextmanager
    async def pair() -> AsyncIterator[tuple[Link, Link]]:
        ours, theirs = socket.socketpair()
        left, right = await Link.wrap(ours.detach()), await Link.wrap(theirs.detach())
        try:
            yield left, right
        finally:
            with anyio.CancelScope(shield=True):
                await left.aclose()
                await right.aclose()

    async def main() -> None:
        with anyio.fail_after(20):
            async with pair() as (left, right), anyio.create_task_group() as tasks:
                tasks.start_soon(left.run_sender)
                tasks.start_soon(right.run_sender)
                await body(left, right)
                tasks.cancel_scope.cancel()

    anyio.run(main, backend="asyncio", backend_options={"use_uvloop": True})


async def receive(link: Link, count: int) -> list[tuple[Message, list[int]]]:
    found: list[tuple[Message, list[int]]] = []
    async with contextlib.aclosing(link.receive()) as messages:
        async for item in messages:
            found.append(item)
            if len(found) == count:
                break
    return found


def test_frames_and_descriptors_arrive_in_order() -> None:
    """A descriptor goes to the frame that claims it, and no exec inherits it; frames may be larger than a read."""

    async def body(left: Link, right: Link) -> None:
        reads, writes = os.pipe()
        large = EndStaging(save_id="a", values=b"x" * (3 << 20), metadata=b"")
        left.send(Beat(moved=1))
        left.send(Adopt(nbytes=5), reads)
        left.send(large)
        left.send(Adopt(nbytes=6), writes)
        assert not left.is_idle
        items = await receive(right, 4)
        assert [message for message, _ in items] == [Beat(moved=1), Adopt(nbytes=5), large, Adopt(nbytes=6)]
        (got_reads,), (got_writes,) = items[1][1], items[3][1]
        assert not os.get_inheritable(got_reads)
        os.write(got_writes, b"through")
        assert os.read(got_reads, 10) == b"through"
        await left.wait_idle()
        for fd in (got_reads, got_writes):
            os.close(fd)
        for fd in (reads, writes):  # a descriptor that is sent is the link's, and closed behind
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)

    run(body)


def test_a_frame_cut_at_every_byte_keeps_its_descriptor() -> None:
    """The descriptor comes with the first byte, long before the frame is whole."""

    async def body(left: Link, right: Link) -> None:
        frame = encode(Adopt(nbytes=7))
        fd = os.open("/dev/null", os.O_RDONLY)
        socket.send_fds(left._socket, [frame[:1]], [fd])
        os.close(fd)
        got: list[tuple[Message, list[int]]] = []

        async def read() -> None:
            got.extend(await receive(right, 1))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            for index in range(1, len(frame)):
                for _ in range(5):
                    await anyio.lowlevel.checkpoint()
                assert got == []
                left._socket.send(frame[index : index + 1])
        ((message, (fd,)),) = got
        assert message == Adopt(nbytes=7)
        assert os.readlink(f"/proc/self/fd/{fd}") == "/dev/null"
        os.close(fd)

    run(body)


@pytest.mark.parametrize("what", ["missing", "too many"])
def test_descriptors_and_claims_must_fit(what: str) -> None:
    """A claim without a descriptor, and descriptors without a claim."""

    async def body(left: Link, right: Link) -> None:
        if what == "missing":
            left.send(Adopt(nbytes=1))
        else:
            for _ in range(9):
                left.send(Cancel(save_id=""), os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(ProtocolError, match="descriptors"):
            await receive(right, 9)

    run(body)


def test_what_a_dead_peer_had_sent_is_drained() -> None:
    """Frames that nobody had read are handled after its end, descriptors too, without waiting for more."""

    async def body(left: Link, right: Link) -> None:
        left.send(Beat(moved=1))
        left.send(Adopt(nbytes=5), os.open("/dev/null", os.O_RDONLY))
        left.send(Beat(moved=2))
        await left.wait_idle()
        handled: list[Message] = []

        def handle(message: Message, fds: list[int]) -> None:
            handled.append(message)
            for fd in fds:
                os.close(fd)

        right.drain(handle)
        assert handled == [Beat(moved=1), Adopt(nbytes=5), Beat(moved=2)]
        left.send(Beat(moved=3))
        await left.wait_idle()
        await left.aclose()
        right.drain(handle)
        assert handled[-1] == Beat(moved=3)

    run(body)


def test_a_muted_end_drops_what_waits_and_what_comes() -> None:
    """Descriptors are closed, nobody waits, and nothing is sent."""

    async def body(left: Link, right: Link) -> None:
        fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(2)]
        left.send(Adopt(nbytes=1), fds[0])
        left.mute()
        left.send(Adopt(nbytes=1), fds[1])
        assert left.is_idle
        await left.wait_idle()
        for fd in fds:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
        seen: list[Message] = []
        right.drain(lambda message, fds: seen.append(message))
        assert seen == []

    run(body)


def test_a_peer_that_is_gone_stops_the_sender_quietly() -> None:
    """Its death is somebody else's news."""

    async def body(left: Link, right: Link) -> None:
        await right.aclose()
        for moved in range(3):
            left.send(Beat(moved=moved))
        await left.wait_idle()
        assert await receive(left, 1) == []

    run(body)


def test_what_arrived_unclaimed_is_closed() -> None:
    """With the link."""

    async def body(left: Link, right: Link) -> None:
        left.send(Cancel(save_id=""), os.open("/dev/null", os.O_RDONLY))
        await receive(right, 1)
        await right.aclose()

    run(body)
