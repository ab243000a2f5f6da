"""The star over loopback sockets, all ranks in one loop."""

from __future__ import annotations

import contextlib
import logging
import resource
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import anyio.abc
import pytest

from aiockpt.protocol import proof
from aiockpt.protocol.agreeing import Pause
from aiockpt.protocol.frames import encode
from aiockpt.protocol.star import Ended, GiveUp, Join, Leave, MemberBeat, Silent
from aiockpt.protocol.terms import WireError
from aiockpt.worker import star_link
from aiockpt.worker.star_hub import StarHub, make_room
from aiockpt.worker.star_link import StarLink
from tests.worker.star_parties import PACKAGE, TOKEN, MemoryClerk, Rank, hub_of, listen, member_of

pytestmark = pytest.mark.process  # for the check that no descriptor is left


class Star:
    """A hub and its members, each of which can be ended and begun again."""

    def __init__(
        self, world: int, tasks: anyio.abc.TaskGroup, listener: socket.socket, options: dict[str, Any]
    ) -> None:
        self.ranks = [Rank(rank, world) for rank in range(world)]
        self.clerk = MemoryClerk()
        self.listener = listener
        self.address: tuple[str, int] = listener.getsockname()
        self._tasks = tasks
        self._options = options
        self._scopes: dict[int, anyio.CancelScope] = {}
        self._ended: dict[int, anyio.Event] = {}

    def begin(self, rank: int, **options: Any) -> None:
        """Start the worker of a rank."""
        if rank == 0:
            star: Any = hub_of(self.listener, self.ranks[0], self.clerk, **{**self._options, **options})
        else:
            timeouts = {name: value for name, value in self._options.items() if name != "arrival_timeout"}
            star = member_of(self.address, self.ranks[rank], **{**timeouts, **options})
        scope, ended = anyio.CancelScope(), anyio.Event()
        self._scopes[rank], self._ended[rank] = scope, ended

        async def run() -> None:
            with scope:
                await star.run()
            ended.set()

        self._tasks.start_soon(run)

    async def end(self, rank: int) -> None:
        """End it; its party stays."""
        self._scopes[rank].cancel()
        await self._ended[rank].wait()

    async def all_in(self) -> None:
        await until(lambda: all(rank.welcomes for rank in self.ranks))

    async def outcome(self, n: int) -> list[Ended]:
        await until(lambda: all(n in rank.ended for rank in self.ranks))
        return [rank.ended[n] for rank in self.ranks]


async def until_gone(address: tuple[str, int], rank: Rank, **options: Any) -> None:
    """Have a member try until it is told that no hub came in time."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(member_of(address, rank, return_timeout=0.3, stall_timeout=0.6, **options).run)
        await until(lambda: rank.gone_for)
        tasks.cancel_scope.cancel()


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(30):
        while not condition():  # noqa: ASYNC110 -- conditions over several ranks
            await anyio.sleep(0.002)


def run(world: int, body: Callable[[Star], Awaitable[None]], **options: Any) -> None:
    @contextlib.asynccontextmanager
    async def stars() -> AsyncIterator[Star]:
        with listen() as listener:
            async with anyio.create_task_group() as tasks:
                star = Star(world, tasks, listener, options)
                for rank in range(world):
                    star.begin(rank)
                yield star
                tasks.cancel_scope.cancel()

    async def main() -> None:
        with anyio.fail_after(60):
            async with stars() as star:
                await body(star)

    anyio.run(main, backend="asyncio", backend_options={"use_uvloop": True})


def test_a_save_of_all_ranks_is_committed() -> None:
    async def body(star: Star) -> None:
        await star.all_in()
        assert sorted(epoch for rank in star.ranks for epoch in rank.welcomes) == [1, 2, 3, 4]
        for rank in star.ranks:
            rank.save(0, step=10)
        assert {ended.path for ended in await star.outcome(0)} == {"step-10"}
        assert star.clerk.done.count("check") == 1
        assert not star.clerk.attempts

    run(4, body)


def test_an_error_on_one_rank_ends_the_save_on_all() -> None:
    async def body(star: Star) -> None:
        await star.all_in()
        star.ranks[2].holds = True
        for rank in star.ranks:
            rank.save(0, step=10)
        await until(lambda: star.ranks[2].opened)
        assert star.ranks[2].star is not None
        star.ranks[2].star.say(GiveUp(n=0, error=WireError(kind="storage", what="no space", phase="write")))
        errors = [ended.error for ended in await star.outcome(0)]
        assert {(error.rank, error.what, error.phase) for error in errors if error} == {(2, "no space", "write")}
        await until(lambda: not star.clerk.attempts)

    run(3, body)


def test_a_worker_that_comes_again_has_all_ranks_write_again() -> None:
    async def body(star: Star) -> None:
        await star.all_in()
        star.ranks[1].holds = True
        for rank in star.ranks:
            rank.save(0, step=10)
        await until(lambda: star.ranks[1].opened)
        await star.end(1)
        star.ranks[1].holds = False
        star.begin(1)
        assert all(ended.error is None for ended in await star.outcome(0))
        assert star.clerk.done.count("make") == 2

    run(3, body)


def test_a_new_hub_takes_the_same_listener() -> None:
    """Members come again by themselves, and what the old hub had opened is ended."""

    async def body(star: Star) -> None:
        await star.all_in()
        star.ranks[1].holds = True
        for rank in star.ranks:
            rank.save(0, step=10)
        await until(lambda: star.ranks[1].opened and star.ranks[2].opened)
        await star.end(0)
        await until(lambda: star.ranks[1].lost_for and star.ranks[2].lost_for)
        star.ranks[1].holds = False
        star.begin(0, is_first=False)
        assert all(ended.error is None for ended in await star.outcome(0))
        assert star.clerk.done.count("look") == 1

    run(3, body)


def test_what_was_published_by_the_old_hub_is_found() -> None:
    async def body(star: Star) -> None:
        await star.all_in()
        star.ranks[1].holds = True
        for rank in star.ranks:
            rank.save(0, step=10)
        await until(lambda: star.ranks[1].opened and star.ranks[0].opened)
        assert star.ranks[1].opened is not None
        star.clerk.published[10] = star.ranks[1].opened.save_id
        await star.end(0)
        star.begin(0, is_first=False)
        assert {ended.path for ended in await star.outcome(0)} == {"step-10"}
        assert star.clerk.done.count("make") == 1

    run(2, body)


def test_a_silent_member_is_lost_and_fails_the_save() -> None:
    """Its connection stands; a stopped process says nothing."""

    async def body(star: Star) -> None:
        mute = await Raw.join(star.address, rank=1, world=2)
        star.ranks[0].save(0, step=10)
        await until(lambda: 0 in star.ranks[0].ended)
        error = star.ranks[0].ended[0].error
        assert error is not None
        assert error.rank == 1
        await mute.closed()

    async def alone(star: Star) -> None:
        await star.end(1)
        await body(star)

    run(2, alone, stall_timeout=0.6, return_timeout=0.3)


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Counter[StarLink]:
    """Count how often each end of a connection was spoken to."""
    found: Counter[StarLink] = Counter()
    receive = StarLink.data_received

    def count(self: StarLink, data: bytes) -> None:
        found[self] += 1
        receive(self, data)

    monkeypatch.setattr(StarLink, "data_received", count)
    return found


def test_beats_keep_ranks_that_say_nothing(words: Counter[StarLink]) -> None:
    async def body(star: Star) -> None:
        await star.all_in()
        words.clear()
        # Six beats are as long as the silence that ends a connection.
        await until(lambda: len(words) == 4 and min(words.values()) >= 30)
        assert [len(rank.welcomes) for rank in star.ranks] == [1, 1, 1]
        assert not any(rank.lost_for for rank in star.ranks)

    run(3, body, stall_timeout=0.2)


def test_who_was_stopped_drops_nobody(words: Counter[StarLink]) -> None:
    """A turn of its loop that took long counts for a short one."""

    async def body(star: Star) -> None:
        await star.all_in()
        threading.Event().wait(0.6)  # the whole loop stands
        words.clear()
        await until(lambda: len(words) == 4)  # each end has counted its turn, and beaten
        assert not any(rank.lost_for for rank in star.ranks)

    run(3, body, stall_timeout=0.3)


def test_a_hub_that_does_not_come_back_is_told_once_and_may_come_later() -> None:
    async def body(star: Star) -> None:
        await star.all_in()
        await star.end(0)
        await until(lambda: star.ranks[1].gone_for)
        error = star.ranks[1].gone_for[0]
        assert (error.kind, error.rank) == ("peer", 0)
        star.begin(0, is_first=False)
        await until(lambda: len(star.ranks[1].welcomes) == 2)
        assert len(star.ranks[1].gone_for) == 1

    run(2, body, stall_timeout=0.6, return_timeout=0.3)


def test_a_rank_that_leaves_fails_what_is_open() -> None:
    async def body(star: Star) -> None:
        await star.all_in()
        star.ranks[0].save(0, step=10)
        assert star.ranks[1].star is not None
        star.ranks[1].star.say(Leave(why="its trainer died"))
        await until(lambda: 0 in star.ranks[0].ended)
        error = star.ranks[0].ended[0].error
        assert error is not None
        assert (error.rank, error.why) == (1, "its trainer died")

    run(2, body)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_whose_trainer_is_silent_ends_what_waits_for_it(victim: int) -> None:
    """A save and a meeting; once the trainer is heard again all goes on."""

    async def body(star: Star) -> None:
        await star.all_in()
        silent, other = star.ranks[victim], star.ranks[1 - victim]
        assert silent.star is not None
        other.save(0, step=10)
        other.attend("a")
        await until(lambda: other.opened)
        silent.star.say(Silent(error=WireError(kind="peer", what="not heard")))
        await until(lambda: 0 in other.ended and other.guest.answer("a"))
        met = other.guest.answer("a")
        assert met is not None
        for error, phase in ((other.ended[0].error, "save"), (met.error, "")):
            assert error is not None
            assert (error.rank, error.what, error.phase) == (victim, "not heard", phase)
        await until(lambda: not star.clerk.attempts)
        silent.star.say(Silent())
        silent.save(1, step=10)  # behind that word
        await until(lambda: silent.opened)
        other.save(1, step=10)
        await until(lambda: 1 in silent.ended and 1 in other.ended)
        assert silent.ended[1].error is None
        assert other.ended[1].error is None

    run(2, body)


def test_only_a_worker_that_is_lost_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """The end of a job has no lines in rank 0's log, one for each rank."""

    async def body(star: Star) -> None:
        await star.all_in()
        leaving = star.ranks[1].star
        assert leaving is not None
        await leaving.leave("its Checkpointer was closed")
        await star.end(2)
        await until(lambda: "rank 2 is away" in caplog.text)
        assert "rank 1" not in caplog.text

    with caplog.at_level(logging.INFO, "aiockpt.worker"):
        run(3, body)


def test_a_rank_that_does_not_call_is_named_in_time() -> None:
    async def body(star: Star) -> None:
        await star.all_in()
        star.ranks[0].save(0, step=10)
        await until(lambda: 0 in star.ranks[0].ended)
        error = star.ranks[0].ended[0].error
        assert error is not None
        assert "rank 1 did not call save(10)" in error.what

    run(2, body, arrival_timeout=0.2)


def test_a_save_that_one_rank_asks_for_is_due_at_one_step_on_all() -> None:
    async def body(star: Star) -> None:
        await star.all_in()
        star.ranks[2].ask("SIGTERM")
        found: list[tuple[int, Any]] = []
        for rank in star.ranks:
            step = 0
            while (reason := rank.pacer.due(step)) is None:
                step += 1
                await anyio.sleep(0.001)
            await until(lambda rank=rank, step=step: rank.pacer.due(step) is not Pause.PAUSE)  # type: ignore[misc]
            reason = rank.pacer.due(step)
            found.append((step, reason))
        assert found == [(found[0][0], "SIGTERM")] * 3

    run(3, body)


def test_ranks_meet_though_the_hub_dies_in_between() -> None:
    async def body(star: Star) -> None:
        await star.all_in()
        star.ranks[1].attend("a")
        star.ranks[2].attend("a")
        await star.end(0)
        await until(lambda: star.ranks[1].lost_for and star.ranks[2].lost_for)
        star.begin(0, is_first=False)
        await until(lambda: all(len(rank.welcomes) == 2 for rank in star.ranks))
        star.ranks[0].attend("a", word=b"go")
        await until(lambda: all(rank.guest.answer("a") for rank in star.ranks))
        assert {met.word for rank in star.ranks if (met := rank.guest.answer("a"))} == {b"go"}

    run(3, body)


def test_a_meeting_ends_with_a_rank_that_leaves() -> None:
    async def body(star: Star) -> None:
        await star.all_in()
        star.ranks[0].attend("a")
        assert star.ranks[1].star is not None
        star.ranks[1].star.say(Leave(why="its trainer died"))
        await until(lambda: star.ranks[0].guest.answer("a"))
        met = star.ranks[0].guest.answer("a")
        assert met is not None
        assert met.error is not None
        assert (met.error.rank, met.error.why) == (1, "its trainer died")

    run(2, body)


def test_a_rank_that_does_not_come_to_a_meeting_is_named_in_time() -> None:
    async def body(star: Star) -> None:
        await star.all_in()
        star.ranks[1].attend("a")
        await until(lambda: star.ranks[1].guest.answer("a"))
        met = star.ranks[1].guest.answer("a")
        assert met is not None
        assert met.error is not None
        assert met.error.what == "rank 0 did not come to 'a' within 0.2 s of rank 1"

    run(2, body, arrival_timeout=0.2)


def test_the_limit_of_descriptors_is_raised_as_far_as_it_goes(caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard - 10, hard))
        make_room(hard - 5)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard - 5, hard)
        make_room(hard - 50)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard - 5, hard)
        assert not caplog.records
        make_room(hard + 1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
        assert "ulimit -Hn" in caplog.text
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- who is not taken


@pytest.mark.parametrize(
    ("join", "word"),
    [
        (Join(rank=1, world=2, package="0.0.9"), "version '0.0.9'"),
        (Join(rank=1, world=3, package=PACKAGE), "there are 3 ranks"),
        (Join(rank=2, world=2, package=PACKAGE), "none of the ranks"),
        (Join(rank=0, world=2, package=PACKAGE), "none of the ranks"),
    ],
)
def test_a_member_that_does_not_fit_is_told_why(join: Join, word: str) -> None:
    async def body(star: Star) -> None:
        rank = Rank(join.rank, join.world, package=join.package)
        await member_of(star.address, rank).run()
        (error,) = rank.gone_for
        assert error.kind == "config"
        assert word in error.why
        await works(star)

    run(2, body)


def test_a_second_worker_of_a_rank_replaces_the_first() -> None:
    """And the first does not come back."""

    async def body(star: Star) -> None:
        await star.all_in()
        first, second = star.ranks[1], Rank(1, 2)
        star.ranks[1] = second
        star.begin(1)
        await until(lambda: second.welcomes and first.gone_for)
        assert "another worker" in first.gone_for[0].why
        await works(star)

    run(2, body)


def test_a_member_with_another_token_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    async def body(star: Star) -> None:
        rank = Rank(1, 2)
        await until_gone(star.address, rank, token=b"another")
        assert not rank.welcomes
        assert rank.gone_for[0].why == "it does not take our token"
        await works(star)

    with caplog.at_level(logging.WARNING):
        run(2, body)
    assert [record.message for record in caplog.records if "does not know the token" in record.message]


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: rank0\r\nUser-Agent: curl/8.5.0\r\n\r\n",
        b"\0" * 48,
        b"\xff" * 100_000,
        b"x" * 48 + b"more",
    ],
    ids=["http", "zeros", "much", "more"],
)
def test_a_stranger_is_dropped(said: bytes) -> None:
    async def body(star: Star) -> None:
        stream = await anyio.connect_tcp(*star.address)
        async with stream:
            assert len(await stream.receive()) == proof.CHALLENGE_NBYTES
            with contextlib.suppress(anyio.BrokenResourceError):
                await stream.send(said)
            with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)), anyio.fail_after(5):
                await stream.receive()
        await works(star)

    run(2, body)


def test_a_stranger_that_says_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(star_link.HubEnd, "JOIN_SECONDS", 0.1)

    async def body(star: Star) -> None:
        async with await anyio.connect_tcp(*star.address) as stream:
            await stream.receive()
            with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)), anyio.fail_after(5):
                await stream.receive()

    run(1, body)


def test_many_strangers_hold_few_descriptors() -> None:
    async def body(star: Star) -> None:
        async with contextlib.AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(await anyio.connect_tcp(*star.address)) for _ in range(80)]
            for stream in streams:
                await stream.receive()
            with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)), anyio.fail_after(5):
                await streams[0].receive()
            await works(star)

    run(2, body)


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack("<I", 5000) + b"\0" * 100,  # longer than a Join may be
        encode(MemberBeat()),
        struct.pack("<I", 4) + b"\xc1\xc1\xc1\xc1",
    ],
    ids=["long", "no join", "no msgpack"],
)
def test_what_follows_the_proof_is_a_small_join(frame: bytes) -> None:
    async def body(star: Star) -> None:
        raw = await Raw.prove(star.address)
        await raw.stream.send(frame)
        await raw.closed()
        await works(star)

    run(2, body)


@pytest.mark.parametrize(
    "frame",
    [encode(Join(rank=1, world=2, package=PACKAGE)), struct.pack("<I", 17 << 20), struct.pack("<I", 1) + b"\xc1"],
    ids=["again", "huge", "no msgpack"],
)
def test_garbage_from_a_member_loses_its_connection_only(frame: bytes) -> None:
    async def body(star: Star) -> None:
        await star.end(1)
        raw = await Raw.join(star.address, rank=1, world=2)
        await raw.stream.send(frame)
        await raw.closed()
        star.begin(1)
        await works(star)

    run(2, body)


def test_a_member_that_does_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's memory for it is bounded, and the others hear all."""
    monkeypatch.setattr(star_link, "BACKLOG_NBYTES", 1 << 20)

    async def body(star: Star) -> None:
        await star.end(1)
        raw = await Raw.join(star.address, rank=1, world=2)
        hub = star.ranks[0].star
        assert isinstance(hub, StarHub)
        await until(lambda: hub.joined == 2)
        (link,) = hub._members.values()
        for _ in range(64):
            link.send(Ended(n=0, path="x" * (1 << 20)))
        await until(lambda: hub.joined == 1)
        await raw.stream.aclose()

    run(2, body)


@pytest.mark.parametrize(
    "said", [b"SSH-2.0-OpenSSH_9.6\r\n", b"aiockpt1" + b"x" * 100, b""], ids=["ssh", "more", "end"]
)
def test_a_member_does_not_fall_for_somebody_elses_port(said: bytes) -> None:
    async def main() -> None:
        answered = []

        async def serve(stream: anyio.abc.SocketStream) -> None:
            async with stream:
                await stream.send(said)
                with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                    answered.append(await stream.receive())

        async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
            port = listener.extra(anyio.abc.SocketAttribute.local_port)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(listener.serve, serve)
                rank = Rank(1, 2)
                await until_gone(("127.0.0.1", port), rank)
                tasks.cancel_scope.cancel()
        assert not rank.welcomes
        assert rank.gone_for
        assert not answered

    anyio.run(main, backend="asyncio", backend_options={"use_uvloop": True})


def test_a_hub_that_took_the_port_over_learns_and_gets_nothing() -> None:
    """It cannot prove that it knows the token, so no Join comes."""

    async def main() -> None:
        after: list[bytes] = []

        async def serve(stream: anyio.abc.SocketStream) -> None:
            async with stream:
                await stream.send(proof.challenge(b"n" * 16))
                assert len(await stream.receive()) == proof.ANSWER_NBYTES
                await stream.send(b"\0" * proof.PROOF_NBYTES)
                with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                    after.append(await stream.receive())

        async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
            port = listener.extra(anyio.abc.SocketAttribute.local_port)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(listener.serve, serve)
                rank = Rank(1, 2)
                await until_gone(("127.0.0.1", port), rank)
                tasks.cancel_scope.cancel()
        assert rank.gone_for[0].why == "it does not know the token of this job"
        assert not after

    anyio.run(main, backend="asyncio", backend_options={"use_uvloop": True})


class Raw:
    """A member's bytes by hand."""

    def __init__(self, stream: anyio.abc.SocketStream) -> None:
        self.stream = stream

    @classmethod
    async def prove(cls, address: tuple[str, int]) -> Raw:
        stream = await anyio.connect_tcp(*address)
        challenged = await stream.receive()
        answered = proof.answer(TOKEN, challenged, b"n" * 16)
        await stream.send(answered)
        assert proof.is_confirmed(TOKEN, answered, await stream.receive())
        return cls(stream)

    @classmethod
    async def join(cls, address: tuple[str, int], *, rank: int, world: int) -> Raw:
        raw = await cls.prove(address)
        await raw.stream.send(encode(Join(rank=rank, world=world, package=PACKAGE)))
        assert await raw.stream.receive()
        return raw

    async def closed(self) -> None:
        with anyio.fail_after(10), contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            while True:
                await self.stream.receive()
        await self.stream.aclose()


async def works(star: Star) -> None:
    """A save of all ranks is committed."""
    await star.all_in()
    for rank in star.ranks:
        rank.save(0, step=10)
    assert all(ended.error is None for ended in await star.outcome(0))
