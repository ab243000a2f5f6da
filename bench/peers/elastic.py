"""torch.distributed.elastic.multiprocessing, as its documentation and its agent use it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, ClassVar

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes

from bench.supervisor_process import Job, held

__all__ = ["Elastic", "ElasticOften"]


class Elastic:
    """Waits with the default period."""

    PERIOD: ClassVar[float] = 1.0

    def run(self, job: Job, tell: Callable[..., None]) -> dict[str, Any]:
        """Run one group to its end; what is left in the buffer of ``sys.stdout`` is written out behind that."""
        entrypoint, args = job.work
        logs = DefaultLogsSpecs(log_dir=job.log_dir, tee=Std.OUT if job.tee else Std.NONE)
        before = held()
        called_ns = time.monotonic_ns()
        context = start_processes("trainee", entrypoint, args, {rank: {} for rank in args}, logs)
        try:
            tell(called_ns=called_ns, pids=context.pids(), **before)
            result = context.wait(period=self.PERIOD)
            returned_ns = time.monotonic_ns()
        finally:
            context.close()
        sys.stdout.flush()
        assert result is not None
        return {"returned_ns": returned_ns, "known_ns": None, "failed": len(result.failures)}


class ElasticOften(Elastic):
    """Waits with the period of torchrun's agent."""

    PERIOD = 0.1
