"""The last word of a rank that has no worker: its trainer joins the star, says that the rank leaves, and why."""

from __future__ import annotations

import anyio

from aiockpt.protocol.star import Join, StarMessage
from aiockpt.protocol.terms import WireError
from aiockpt.worker.star_member import StarMember

__all__ = ["Farewell"]


class Farewell:
    """A ``star.Party`` that stays for one message.

    Args:
        address: Of rank 0's worker.
        token: Of the job.
        join: What the rank says first; its ``why`` is the reason.
        patience: Seconds without a word from the hub after which it is tried again.
    """

    def __init__(self, address: tuple[str, int], token: bytes, join: Join, *, patience: float) -> None:
        self._join = join
        self._is_in = anyio.Event()
        self._star = StarMember(address, token=token, party=self, stall_timeout=patience, return_timeout=None)

    async def run(self) -> None:
        """Say it, or find that nobody takes it; bound this, the hub may never be there."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._star.run)
            await self._is_in.wait()
            await self._star.leave(self._join.why)
            tasks.cancel_scope.cancel()

    def join(self) -> Join:
        """See ``star.Party``."""
        return self._join

    def welcome(self, epoch: int) -> None:
        """See ``star.Party``."""
        self._is_in.set()

    def hear(self, message: StarMessage) -> None:
        """Nothing is left to answer."""

    def lost(self, why: str) -> None:
        """It is tried again, as long as there is time."""

    def gone(self, error: WireError) -> None:
        """It is not taken in: it is known to have gone already."""
        self._is_in.set()
