"""What exists from the taking of a run to its release, and only then."""

from __future__ import annotations

from aiockpt.config import Options
from aiockpt.coordinator.arena_owner import ArenaOwner
from aiockpt.coordinator.desk import Desk
from aiockpt.coordinator.loop_thread import LoopThread
from aiockpt.coordinator.restoring import Restoring
from aiockpt.coordinator.saves import Saves
from aiockpt.coordinator.saving import Saving
from aiockpt.coordinator.schedule import Schedule
from aiockpt.coordinator.spans import Spans
from aiockpt.coordinator.tally import Tally
from aiockpt.staging.stager import Stager
from aiockpt.storage.claim import RunClaim
from aiockpt.storage.faults import Faults

__all__ = ["OpenRun"]


class OpenRun:
    """The claim on the run, and what stands on it. Made in the coordinator's loop."""

    def __init__(
        self,
        options: Options,
        claim: RunClaim,
        *,
        loop: LoopThread,
        desk: Desk,
        arena: ArenaOwner,
        stager: Stager,
        schedule: Schedule,
        spans: Spans,
        tally: Tally,
        faults: Faults,
    ) -> None:
        self.claim = claim
        self.saves = Saves(options, desk, claim, loop.tasks, faults, tally)
        self.saving = Saving(
            options,
            loop=loop,
            desk=desk,
            saves=self.saves,
            arena=arena,
            stager=stager,
            schedule=schedule,
            highest_ordinal=claim.highest_ordinal,
            spans=spans,
            faults=faults,
        )
        self.restoring = Restoring(options.run, claim, self.saves, self.saving, stager, spans)
