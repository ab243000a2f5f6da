"""The values of several bodies → one list: what stands at one place must be equal.

Two kinds are each rank's share of one thing: the metadata of a module, which has a line for each submodule that the
rank has, and the parameter names in an optimizer's groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from aiockpt.format.names import Segments

__all__ = ["join_values"]


def join_values(values: Sequence[bytes], path: Segments, *, is_metadata: bool) -> bytes | int:
    """Return what the encoded values at one place are together, or the index of one that contradicts those before it.

    Args:
        values: JSON, as ``format.values`` makes it.
        path: The place.
        is_metadata: Whether it is a module's metadata.
    """
    together: _Together
    if is_metadata:
        together = _Lines()
    elif path[-1:] == ("param_groups",):
        together = _Groups()
    elif path[-3:-2] == ("param_groups",) and path[-1] == "params":
        together = _Names()
    else:
        together = _Equal()
    seen = set()
    for index, value in enumerate(values):
        if value not in seen:
            seen.add(value)
            if not together.add(msgspec.json.decode(value)):
                return index
    return values[0] if len(seen) == 1 else msgspec.json.encode(together.json())


class _Together(Protocol):
    """Takes one value after the other."""

    def add(self, json: Any) -> bool:
        """Take a value in, and tell whether it contradicts none before it."""

    def json(self) -> Any:
        """Return all that was taken in."""


class _Equal:
    """One value."""

    def __init__(self) -> None:
        self._known: list[Any] = []

    def add(self, json: Any) -> bool:
        self._known.append(json)
        return len(self._known) == 1

    def json(self) -> Any:
        return self._known[0]


class _Names:
    """A list of names, each once."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def add(self, json: Any) -> bool:
        if not isinstance(json, list) or not all(isinstance(name, str) for name in json):
            return False
        self._names |= dict.fromkeys(json)
        return True

    def json(self) -> Any:
        return list(self._names)


class _Lines:
    """A mapping with text keys, in either of the forms that an encoded one has."""

    def __init__(self) -> None:
        self._tag: str | None = None
        self._lines: dict[str, Any] = {}

    def add(self, json: Any) -> bool:
        if not isinstance(json, dict):
            return False
        tag = next(iter(json)) if len(json) == 1 else ""
        lines = json
        if tag.startswith("~"):
            pairs = json[tag]
            if not isinstance(pairs, list) or not all(isinstance(key, str) for key, _ in pairs):
                return False
            lines = dict(pairs)
        else:
            tag = ""
        if self._tag not in (None, tag) or any(self._lines.get(key, line) != line for key, line in lines.items()):
            return False
        self._tag = tag
        self._lines |= lines
        return True

    def json(self) -> Any:
        return {self._tag: [[key, line] for key, line in self._lines.items()]} if self._tag else self._lines


class _Groups:
    """An optimizer's groups: as many on each rank, equal but for the names of their parameters."""

    def __init__(self) -> None:
        self._groups: list[dict[str, Any]] | None = None
        self._names: list[_Names] = []

    def add(self, json: Any) -> bool:
        if not isinstance(json, list) or not all(isinstance(group, dict) and "params" in group for group in json):
            return False
        if self._groups is None:
            self._groups = json
            self._names = [_Names() for _ in json]
        bare = [[{**group, "params": None} for group in groups] for groups in (self._groups, json)]
        return bare[0] == bare[1] and all(
            names.add(group["params"]) for names, group in zip(self._names, json, strict=True)
        )

    def json(self) -> Any:
        groups = self._groups or []
        return [group | {"params": names.json()} for group, names in zip(groups, self._names, strict=True)]
