"""Start, watch and stop the trainers of a host: asyncio-native, with the names of ``torch.distributed.elastic``.

Importing this package imports neither torch nor anyio: names are loaded when they are first used (PEP 562), so that the
guardian and the children stay small.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES: dict[str, tuple[str, ...]] = {}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__: list[str] = []


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'aiockpt.elastic' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
