"""The command of a Python process that runs a module of ours."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from aiockpt.errors import ConfigError

__all__ = ["boot"]

_BOOT = """\
import json, sys
sys.path[:] = json.loads(sys.argv.pop(1))
import importlib
importlib.import_module(sys.argv.pop(1)).main()
"""


def boot(module: str, *flags: str, path: Sequence[str]) -> list[str]:
    """Return the arguments of a process like this one that calls ``main()`` of a module of this package.

    Args:
        module: Its dotted name.
        flags: Of the interpreter.
        path: Its ``sys.path``.

    Raises:
        ConfigError: This interpreter does not know its own executable.
    """
    if not sys.executable:
        raise ConfigError(
            "no process was started: there is no interpreter to run it",
            why="sys.executable is empty: this program embeds Python without saying where its executable is",
            next="set sys.executable to a Python that has aiockpt",
        )
    return [sys.executable, *flags, "-c", _BOOT, json.dumps(list(path)), module]
