"""How often a worker may be started again, pure."""

from __future__ import annotations

from collections import deque

from aiockpt.config import RestartPolicy
from aiockpt.errors import RestartLimitError

__all__ = ["RestartBudget"]


class RestartBudget:
    """Spends a RestartPolicy; times are seconds of one monotonic clock."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._restarts: deque[float] = deque()
        self.total = 0

    def spend(self, now: float) -> float:
        """Return the seconds to wait before the restart that a death at ``now`` calls for.

        Raises:
            RestartLimitError: The policy is used up.
        """
        while self._restarts and self._restarts[0] <= now - self._policy.window:
            self._restarts.popleft()
        used = len(self._restarts)
        if used >= self._policy.tries:
            raise RestartLimitError(
                f"the checkpoint worker died {used + 1} times within {self._policy.window:g} s",
                why="the restart policy is used up",
                next="training is unharmed, saving is over: look at the worker's log, then open a new Checkpointer",
                restarts=used,
                window=self._policy.window,
            )
        self._restarts.append(now)
        self.total += 1
        return self._policy.delay(used)
