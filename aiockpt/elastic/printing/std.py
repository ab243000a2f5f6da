"""Which of a trainer's two output streams is meant: ``Std``, for one rank or for all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import STRICT, IntFlag

from aiockpt.errors import ConfigError

__all__ = ["Std", "normalise", "to_map"]

_ONE = re.compile(r"[0-3]")
_ITEM = re.compile(r"([0-9]{1,9}):([0-3])")  # nine digits are a thousand million ranks; int() itself refuses 4,301

_NEXT = "0 is none, 1 stdout, 2 stderr, 3 both: give one of them for all ranks, or one for each as in 0:3,10:1"


class Std(IntFlag, boundary=STRICT):
    """Output streams of a trainer, as flags."""

    NONE = 0
    OUT = 1
    ERR = 2
    ALL = OUT | ERR

    @classmethod
    def from_str(cls, text: str) -> Std | dict[int, Std]:
        """Parse what a command line says: one digit for all ranks, or ``rank:digit`` with commas.

        ``"3"`` is ``Std.ALL``; ``"0:3,10:1"`` is ``{0: Std.ALL, 10: Std.OUT}``.

        Raises:
            ConfigError: For anything else, a rank that is named twice among it. It is a ValueError too.
        """
        if not isinstance(text, str):
            raise _refuse(f"{text!r} is no text")
        if _ONE.fullmatch(text):
            return cls(int(text))
        found: dict[int, Std] = {}
        for item in text.split(","):
            match = _ITEM.fullmatch(item)
            if match is None:
                raise _refuse(f"{item[:100]!r} is neither a digit of 0 to 3 nor rank:digit, in {text[:200]!r}")
            rank = int(match[1])
            if rank in found:
                raise _refuse(f"rank {rank} is named twice in {text[:200]!r}")
            found[rank] = cls(int(match[2]))
        return found


def normalise(value: Std | int | Mapping[int, Std | int], *, argument: str = "std") -> Std | dict[int, Std]:
    """Return one ``Std``, or a new map of them, from flags given as ``Std`` or as plain ints.

    Args:
        value: For all ranks, or by local rank.
        argument: What an error calls it.

    Raises:
        ConfigError: Something is no flag, or a rank is no int >= 0.
    """
    if not isinstance(value, Mapping):
        return _flag(value, "", argument)
    for rank in value:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise _refuse(f"{rank!r} is no local rank", argument)
    return {rank: _flag(flag, f" for rank {rank}", argument) for rank, flag in value.items()}


def to_map(
    value: Std | int | Mapping[int, Std | int], local_world_size: int, *, argument: str = "std"
) -> dict[int, Std]:
    """Return the flags of each local rank, in order; a rank that a map does not name has none.

    Args:
        value: For all ranks, or by local rank.
        local_world_size: Number of ranks on this host.
        argument: What an error calls it.

    Raises:
        ConfigError: Something is no flag, or a rank is outside ``range(local_world_size)``.
    """
    given = normalise(value, argument=argument)
    if isinstance(given, Std):
        return dict.fromkeys(range(local_world_size), given)
    outside = sorted(rank for rank in given if rank >= local_world_size)
    if outside:
        raise ConfigError(
            f"{argument} was refused",
            why=f"it names rank {outside[0]}, and the ranks of this host are 0 to {local_world_size - 1}",
            next="name ranks of this host, or give one value for all",
            argument=argument,
        )
    return {rank: given.get(rank, Std.NONE) for rank in range(local_world_size)}


def _flag(value: object, where: str, argument: str) -> Std:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= Std.ALL:
        raise _refuse(f"{value!r}{where} is no flag of 0 to 3", argument)
    return Std(value)


def _refuse(why: str, argument: str = "std") -> ConfigError:
    return ConfigError(f"{argument} was refused", why=why, next=_NEXT, argument=argument)
