"""Shell completion by argcomplete: directories for a run, the steps that stand in it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from typing import Any

from aiockpt.format.names import parse_step

__all__ = ["answer", "attach", "directories", "files", "steps"]

Completer = Callable[..., Iterable[str]]


def answer(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and exit, where it is the shell that asks; else do nothing."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete
        from argcomplete.completers import ChoicesCompleter

        argcomplete.autocomplete(parser, always_complete_options=False, default_completer=ChoicesCompleter({}))


def attach(argument: argparse.Action, completer: Completer) -> None:
    """Have an argument completed."""
    argument.completer = completer  # type: ignore[attr-defined]  # where argcomplete looks


def directories(prefix: str, **more: Any) -> Iterable[str]:
    """Return the directories that begin with ``prefix``."""
    from argcomplete.completers import DirectoriesCompleter

    found: Iterable[str] = DirectoriesCompleter()(prefix)
    return found


def files(prefix: str, **more: Any) -> Iterable[str]:
    """Return the files and directories that begin with ``prefix``."""
    from argcomplete.completers import FilesCompleter

    found: Iterable[str] = FilesCompleter()(prefix)
    return found


def steps(prefix: str, parsed_args: argparse.Namespace, **more: Any) -> list[str]:
    """Return the steps of the run that was typed; no file is opened."""
    try:
        names = os.listdir(parsed_args.run)
    except OSError:
        return []
    return [str(step) for step in map(parse_step, names) if step is not None]
