"""What each rank has for itself, marked as such by its owner."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["PerRank"]


class PerRank(msgspec.Struct, frozen=True, eq=False):
    """Something of the state that differs by rank: each rank saves its own, and gets its own back.

    A value, a tensor, a container of these, or an object with ``state_dict`` and ``load_state_dict``, such as the data
    loader of this rank. ``RNG()`` needs no mark.

    A restore writes into what is wrapped, as it would without the mark. Where that is a plain value, which nothing can
    be written into, the container that holds this object gets another one: after a restore
    ``state["position"]`` is ``PerRank(…)`` with the saved value.
    """

    value: Any
    """What is wrapped."""
