"""Ranks and a clerk for tests of the star, in this process or, run as a program, in one of their own."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import dataclass, field
from typing import Any

import anyio

from aiockpt.protocol.agreeing import Pacer
from aiockpt.protocol.meeting import Guest
from aiockpt.protocol.orders import CheckPlans, Commit, Compare, Drop, Look, MakeAttempt
from aiockpt.protocol.star import (
    Arguments,
    Arrive,
    Attend,
    Body,
    Details,
    Ended,
    Join,
    Met,
    Open,
    OpenCall,
    StarMessage,
    WantBody,
    WantDetails,
    Written,
)
from aiockpt.protocol.terms import WireError
from aiockpt.worker.star import Star
from aiockpt.worker.star_hub import StarHub
from aiockpt.worker.star_member import StarMember

TOKEN = b"sixteen bytes ok"
PACKAGE = "1.2.3"


@dataclass
class Rank:
    """A rank whose saves are on disk as soon as they are opened, unless it ``holds``."""

    rank: int
    world: int
    package: str = PACKAGE
    holds: bool = False
    star: Star | None = None
    welcomes: list[int] = field(default_factory=list)
    heard: list[StarMessage] = field(default_factory=list)
    lost_for: list[str] = field(default_factory=list)
    gone_for: list[WireError] = field(default_factory=list)
    arrival: Arrive | None = None
    opened: Open | None = None
    ended: dict[int, Ended] = field(default_factory=dict)
    pacer: Pacer = field(default_factory=Pacer)
    guest: Guest = field(default_factory=Guest)

    def ask(self, reason: str) -> None:
        assert self.star is not None
        for message in self.pacer.ask(reason):
            self.star.say(message)

    def attend(self, meeting: str, **options: Any) -> None:
        assert self.star is not None
        for message in self.guest.attend(Attend(meeting=meeting, **{"claim": "", **options})):
            self.star.say(message)

    def save(self, n: int, step: int, **arguments: Any) -> None:
        assert self.star is not None
        self.arrival, self.opened = Arrive(n=n, arguments=Arguments(step=step, **arguments), digest="plan"), None
        self.star.say(self.arrival)

    def join(self) -> Join:
        known = self.opened
        return Join(
            rank=self.rank,
            world=self.world,
            package=self.package,
            open_call=None if known is None else OpenCall(n=known.n, save_id=known.save_id, attempt=known.attempt),
        )

    def welcome(self, epoch: int) -> None:
        assert self.star is not None
        self.welcomes.append(epoch)
        for message in self.guest.rejoined():
            self.star.say(message)
        if self.arrival is not None:
            self.star.say(self.arrival)

    def hear(self, message: StarMessage) -> None:
        assert self.star is not None
        self.heard.append(message)
        for answer in self.pacer.hear(message):
            self.star.say(answer)
        match message:
            case WantBody(digest=digest):
                self.star.say(Body(digest=digest, body=b"a plan"))
            case WantDetails(n=n):
                self.star.say(Details(n=n, values=b"[]"))
            case Open(verdict="take"):
                self.opened = message
                if not self.holds:
                    self.write()
            case Met():
                self.guest.hear(message)
            case Ended(n=n):
                self.ended[n] = message
                self.arrival = self.opened = None

    def write(self) -> None:
        assert self.star is not None
        assert self.opened is not None
        self.star.say(Written(n=self.opened.n, attempt=self.opened.attempt, files=[]))

    def lost(self, why: str) -> None:
        self.lost_for.append(why)

    def gone(self, error: WireError) -> None:
        self.gone_for.append(error)


@dataclass
class MemoryClerk:
    """A run directory in memory."""

    published: dict[int, str] = field(default_factory=dict)
    attempts: set[tuple[str, int]] = field(default_factory=set)
    done: list[str] = field(default_factory=list)

    async def look(self, order: Look) -> Ended | None:
        self.done.append("look")
        found = self.published.get(order.step) == order.save_id
        return Ended(n=order.n, path=f"step-{order.step}") if found else None

    async def make(self, order: MakeAttempt) -> WireError | None:
        self.done.append("make")
        self.attempts.discard((order.save_id, order.attempt - 1))
        self.attempts.add((order.save_id, order.attempt))
        return None

    async def check(self, order: CheckPlans) -> tuple[WireError, int | None] | dict[int, list[str]]:
        self.done.append("check")
        assert order.bodies == {"plan": b"a plan"}
        return {}

    async def compare(self, order: Compare) -> WireError | None:
        self.done.append("compare")
        return None

    async def commit(self, order: Commit) -> Ended:
        self.done.append("commit")
        self.attempts.remove((order.save_id, order.attempt))
        self.published[order.arguments.step] = order.save_id
        return Ended(n=order.n, path=f"step-{order.arguments.step}")

    async def drop(self, order: Drop) -> None:
        self.done.append("drop")
        self.attempts.discard((order.save_id, order.attempt))


def listen() -> socket.socket:
    """Return a listener on loopback, as rank 0's trainer keeps it."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.bind(("127.0.0.1", 0))
    sock.listen(128)
    return sock


def hub_of(listener: socket.socket, rank: Rank, clerk: MemoryClerk, **options: Any) -> StarHub:
    """Return a hub over a descriptor of its own."""
    arguments: dict[str, Any] = {"stall_timeout": 60.0, "arrival_timeout": 60.0, "return_timeout": 60.0}
    hub = StarHub(
        os.dup(listener.fileno()),
        world=rank.world,
        token=TOKEN,
        package=PACKAGE,
        clerk=clerk,
        party=rank,
        **{**arguments, **options},
    )
    rank.star = hub
    return hub


def member_of(address: tuple[str, int], rank: Rank, **options: Any) -> StarMember:
    """Return a member."""
    arguments: dict[str, Any] = {"token": TOKEN, "stall_timeout": 60.0, "return_timeout": 60.0}
    member = StarMember(address, party=rank, **{**arguments, **options})
    rank.star = member
    return member


async def _main(role: dict[str, Any]) -> None:
    """Take part until standard input ends; lines there are saves, each outcome is a line on standard output."""
    rank = Rank(role["rank"], role["world"], holds=role.get("holds", False))
    options = {name: role[name] for name in ("stall_timeout", "return_timeout") if name in role}
    if "listener" in role:
        with socket.socket(fileno=os.dup(role["listener"])) as listener:
            star: Star = hub_of(listener, rank, MemoryClerk(), is_first=role["is_first"], **options)
    else:
        star = member_of(("127.0.0.1", role["port"]), rank, **options)
    hear, welcome, lost = rank.hear, rank.welcome, rank.lost

    def say(**what: Any) -> None:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()

    def and_say(message: StarMessage) -> None:
        hear(message)
        if isinstance(message, Open):
            say(opened=message.n)
        if isinstance(message, Ended):
            error = message.error
            say(ended=message.n, error=None if error is None else error.what)

    def welcome_and_say(epoch: int) -> None:
        welcome(epoch)
        say(epoch=epoch)

    def lose_and_say(why: str) -> None:
        lost(why)
        say(lost=why)

    rank.hear, rank.welcome, rank.lost = and_say, welcome_and_say, lose_and_say  # type: ignore[method-assign]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(star.run)
        while line := await anyio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            order = json.loads(line)
            rank.save(order["n"], order["step"])
        tasks.cancel_scope.cancel()


if __name__ == "__main__":
    anyio.run(_main, json.loads(sys.argv[1]), backend="asyncio", backend_options={"use_uvloop": True})
