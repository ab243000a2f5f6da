"""Faults that are armed from outside while a process runs, one after the other, each met once."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from aiockpt.storage.faults import FaultPoint, Faults
from aiockpt.testing.faults import ArmedFaults, FaultPlan, FaultRule

__all__ = ["InFile", "arm"]


class InFile(Faults):
    """Goes by the first rule that stands in a file, and takes it out before it is carried out.

    So the successor of a killed process meets the next one, and a file that is gone says that every rule was met.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._text = b""
        self._hits = 0
        self._acting = threading.local()

    def at(self, point: FaultPoint, path: str = "") -> None:
        """See ``Faults``."""
        if point is FaultPoint.WORKER_TORN:
            self._acted.at(point, path)
        elif (rule := self._take(point)) is not None:
            once = FaultRule(point=rule.point, action=rule.action, errno=rule.errno, seconds=rule.seconds)
            self._acting.faults = ArmedFaults(FaultPlan(rules=[once]))
            self._acted.at(point, path)

    def clip(self, path: str, offset: int, nbytes: int) -> int:
        """See ``Faults``."""
        return self._acted.clip(path, offset, nbytes)

    @property
    def _acted(self) -> Faults:
        return getattr(self._acting, "faults", Faults())

    def _take(self, point: FaultPoint) -> FaultRule | None:
        with self._lock:
            try:
                with open(self._path, "rb") as file:
                    text = file.read()
            except FileNotFoundError:
                self._text = b""
                return None
            if text != self._text:
                self._text, self._hits = text, 0
            rule, *rest = msgspec.json.decode(text, type=FaultPlan).rules
            if point is rule.point:
                self._hits += 1
            if point is not rule.point or self._hits != rule.nth:
                return None
            arm(self._path, rest)
            return rule


def arm(path: str | Path, rules: Sequence[FaultRule]) -> None:
    """Replace what stands in the file; where there is no rule the file goes."""
    if not rules:
        Path(path).unlink(missing_ok=True)
        return
    text = json.dumps({"rules": msgspec.to_builtins(rules)})
    Path(f"{path}.new").write_text(text)
    os.replace(f"{path}.new", path)
