"""A worker that writes into its log which plans it sends; for ``Coordinator.worker_faults``."""

from __future__ import annotations

import logging

from aiockpt.protocol.star import Body, StarMessage
from aiockpt.storage.faults import NO_FAULTS, Faults
from aiockpt.worker.membership import Membership

TELLING = "tests.ranks.telling_worker:tell", ""

_log = logging.getLogger("aiockpt.worker")


def tell(_: str) -> Faults:
    """Have this process write what it sends; nothing goes wrong in it."""
    say = Membership.say

    def say_and_tell(self: Membership, message: StarMessage) -> None:
        if isinstance(message, Body):
            _log.warning("sends plan %s", message.digest)
        say(self, message)

    Membership.say = say_and_tell  # type: ignore[method-assign]
    return NO_FAULTS
