"""What exists from the taking of a run to its release, and only then."""

from __future__ import annotations

from aiockpt.config import Options
from aiockpt.coordinator.arena_owner import ArenaOwner
from aiockpt.coordinator.desk import Desk
from aiockpt.coordinator.held_run import HeldRun
from aiockpt.coordinator.job import Job
from aiockpt.coordinator.loop_thread import LoopThread
from aiockpt.coordinator.meetings import Meetings
from aiockpt.coordinator.restoring import Restoring
from aiockpt.coordinator.saves import Saves
from aiockpt.coordinator.saving import Saving
from aiockpt.coordinator.schedule import WhenToSave
from aiockpt.coordinator.spans import Spans
from aiockpt.coordinator.tally import Tally
from aiockpt.staging.stager import Stager
from aiockpt.storage.faults import Faults

__all__ = ["OpenRun"]


class OpenRun:
    """The claim on the run, and what stands on it. Made in the coordinator's loop."""

    def __init__(
        self,
        options: Options,
        claim: HeldRun,
        *,
        loop: LoopThread,
        desk: Desk,
        arena: ArenaOwner,
        stager: Stager,
        schedule: WhenToSave,
        spans: Spans,
        tally: Tally,
        faults: Faults,
        job: Job | None,
    ) -> None:
        self.claim = claim
        self.saves = Saves(options, desk, claim, loop.tasks, faults, tally, job)
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
            job=job,
        )
        meetings = None
        if job is not None:
            meetings = Meetings(job.ranks.rank, job.ranks.world, job.say)
            job.subscribers += [self.saves, meetings]
        rank = 0 if job is None else job.ranks.rank
        self.restoring = Restoring(
            options.run, claim, self.saves, self.saving, stager, spans, faults=faults, rank=rank, meetings=meetings
        )
