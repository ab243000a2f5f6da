"""Ours as a supervisor of processes: the asyncio face, under uvloop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import anyio

from aiockpt.elastic import DefaultLogsSpecs, Std, start_processes
from bench.supervisor_process import Job, held

__all__ = ["Ours"]


class Ours:
    """Runs groups under a guardian."""

    def run(self, job: Job, tell: Callable[..., None]) -> dict[str, Any]:
        """Run one group to its end."""
        return anyio.run(self._run, job, tell, backend="asyncio", backend_options={"use_uvloop": True})

    async def _run(self, job: Job, tell: Callable[..., None]) -> dict[str, Any]:
        entrypoint, args = job.work
        logs = DefaultLogsSpecs(log_dir=job.log_dir, tee=Std.OUT if job.tee else Std.NONE)
        before = held()
        called_ns = time.monotonic_ns()
        async with start_processes("trainee", entrypoint, args, {rank: {} for rank in args}, logs) as context:
            tell(called_ns=called_ns, pids=context.pids(), **before)
            result = await context.wait()
            returned_ns = time.monotonic_ns()
        assert result is not None
        known = [failure.detected_ns for failure in result.failures.values()]
        return {"returned_ns": returned_ns, "known_ns": min(known, default=None), "failed": len(result.failures)}
