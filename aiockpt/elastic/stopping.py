"""When to do what to children that are to end, as pure code: one deadline, whatever it is that stops them.

The death signal comes first. Who is still there near the deadline is asked for the stacks of its threads, then killed,
then waited for; these last steps are a share of the time given, not an addition to it. A second signal from outside
shortens the deadline, a third one kills at once; none ends the stop.
"""

from __future__ import annotations

import enum
import signal
from dataclasses import dataclass, field

__all__ = ["DEFAULT_STOP_SECONDS", "Step", "Stop"]

DEFAULT_STOP_SECONDS = 30.0
"""As long as torch gives, and most batch systems."""
_KILLING_SECONDS, _KILLING_SHARE = 2.0, 0.25
"""Of the time given, what asking for stacks and killing take: the kernel needs half a second for 6 GiB of memory."""
_STACKS_SECONDS = 0.5
"""Of that, what writing stacks may take: a Python process answers in milliseconds if its interpreter runs at all."""
_LEAST_REAPING_SECONDS = 1.5
"""A kill is waited for at least so long, though the deadline has passed: else quick stops would report the living."""
_HASTE_SECONDS = 5.0
"""What is left at most when a second signal comes."""


class Step(enum.Enum):
    """What is to be done now."""

    SIGNAL = enum.auto()
    ASK_FOR_STACKS = enum.auto()
    KILL = enum.auto()
    GIVE_UP = enum.auto()


@dataclass
class Stop:
    """One stop of all children, from the death signal to giving up on what the kernel cannot end.

    Args:
        signum: The death signal. SIGKILL leaves out what comes before the kill.
        timeout: Seconds for all of it, at least 0.
        now: On a monotonic clock, in seconds.
    """

    signum: int
    timeout: float
    now: float
    _times: dict[Step, float] = field(init=False)
    _hastened: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.signum == signal.SIGKILL:
            self._times = {Step.KILL: self.now, Step.GIVE_UP: self.now + max(self.timeout, _LEAST_REAPING_SECONDS)}
        else:
            self._times = {Step.SIGNAL: self.now, **_ending(self.now, self.timeout)}

    @property
    def next_at(self) -> float | None:
        """When the next step is due; None behind the last one."""
        return min(self._times.values(), default=None)

    def due(self, now: float) -> list[Step]:
        """Return the steps that are due, in order; each is returned once."""
        steps = [step for step in Step if step in self._times and self._times[step] <= now]
        for step in steps:
            del self._times[step]
        return steps

    def hasten(self, now: float) -> None:
        """Take a further signal: the first one halves what is left, to 5 s at most; the next one kills now."""
        self._hastened += 1
        left = max(0.0, self._times.get(Step.GIVE_UP, now) - now)
        self.shorten(now, min(_HASTE_SECONDS, left / 2) if self._hastened == 1 else 0.0)

    def shorten(self, now: float, timeout: float) -> None:
        """Have it all end in ``timeout`` seconds, if that is sooner."""
        for step, at in _ending(now, timeout).items():
            if step in self._times:
                self._times[step] = min(self._times[step], at)


def _ending(now: float, timeout: float) -> dict[Step, float]:
    share = min(_KILLING_SECONDS, timeout * _KILLING_SHARE)
    stacks = now + timeout - share
    kill = stacks + min(_STACKS_SECONDS, share / 2)
    return {
        Step.ASK_FOR_STACKS: stacks,
        Step.KILL: kill,
        Step.GIVE_UP: max(now + timeout, kill + _LEAST_REAPING_SECONDS),
    }
