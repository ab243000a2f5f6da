"""A fault layer that follows a plan: kill, stop, delay, fail with an errno, or tear a write, at a named point.

A plan is JSON, so that it can be handed to another process: the worker takes it as ``WORKER_ARGUMENT`` and the text.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from fnmatch import fnmatchcase
from typing import Literal

import msgspec

from aiockpt.storage.faults import FaultPoint, Faults

__all__ = ["WORKER_ARGUMENT", "ArmedFaults", "FaultPlan", "FaultRule", "from_json"]

WORKER_ARGUMENT = "aiockpt.testing.faults:from_json"

_TEAR_UNIT = 4096  # torn direct writes end where a sector does


class FaultRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that goes wrong."""

    point: FaultPoint
    """Where; for ``torn`` the point at which the write begins (``worker.block_write``, ``worker.manifest_write``)."""
    action: Literal["kill", "stall", "errno", "torn", "delay"]
    """``kill``: SIGKILL to this process. ``stall``: SIGSTOP to it. ``errno``: raise it as OSError. ``torn``: write the
    first half, then raise ``errno``, or be killed where that is 0. ``delay``: hold this thread for ``seconds``."""
    nth: int = 1
    """Which matching hit of this process it is, from 1; 0 is every one."""
    errno: int = 0
    seconds: float = 0.0
    path: str = "*"
    """Glob that the path given at the point must match."""

    def __post_init__(self) -> None:
        if self.nth < 0 or self.seconds < 0 or self.errno < 0:
            raise ValueError("nth, seconds and errno are not negative")
        if self.action == "errno" and not self.errno:
            raise ValueError("the action errno needs one")


class FaultPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What goes wrong, in any order."""

    rules: list[FaultRule] = []

    def to_json(self) -> str:
        """Return the text that ``from_json`` takes."""
        return msgspec.json.encode(self).decode()


class ArmedFaults(Faults):
    """Carries a plan out. Thread-safe: a rule with an ``nth`` fires once."""

    def __init__(self, plan: FaultPlan) -> None:
        self.hits: Counter[FaultPoint] = Counter()
        """How often each point was passed, for tests that ask whether their fault was met."""
        self._rules = [_Counted(rule) for rule in plan.rules]
        self._lock = threading.Lock()
        self._now = threading.local()

    def at(self, point: FaultPoint, path: str = "") -> None:
        """Pass a point, if the plan lets us."""
        if point is FaultPoint.WORKER_TORN:
            self._after_tear(path)
        with self._lock:
            self.hits[point] += 1
            due = [rule for rule in self._rules if rule.meets(point, path)]
        for counted in due:
            if counted.rule.action == "torn":
                self._now.tear = counted.rule
            else:
                self._act(counted.rule, path)

    def clip(self, path: str, offset: int, nbytes: int) -> int:
        """Halve the write that a ``torn`` rule asked for."""
        if getattr(self._now, "tear", None) is None:
            return nbytes
        self._now.torn, self._now.tear = self._now.tear, None
        half = nbytes // 2
        return half - half % _TEAR_UNIT if half >= _TEAR_UNIT else half

    def _after_tear(self, path: str) -> None:
        rule, self._now.torn = getattr(self._now, "torn", None), None
        if rule is not None:
            if not rule.errno:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(rule.errno, os.strerror(rule.errno), path)

    def _act(self, rule: FaultRule, path: str) -> None:
        match rule.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stall":
                signal.pthread_kill(
                    threading.get_ident(), signal.SIGSTOP
                )  # this thread first: another may be picked else
            case "delay":
                threading.Event().wait(rule.seconds)
            case _:
                raise OSError(rule.errno, os.strerror(rule.errno), path)


class _Counted:
    def __init__(self, rule: FaultRule) -> None:
        self.rule = rule
        self._met = 0

    def meets(self, point: FaultPoint, path: str) -> bool:
        if point is not self.rule.point or not fnmatchcase(path, self.rule.path):
            return False
        self._met += 1
        return self.rule.nth in (0, self._met)


def from_json(text: str) -> Faults:
    """Return the layer for a plan's text.

    Raises:
        msgspec.DecodeError: The text is no plan.
    """
    return ArmedFaults(msgspec.json.decode(text, type=FaultPlan))
