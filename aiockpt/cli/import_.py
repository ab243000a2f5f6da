"""``aiockpt import``: files of other programs as a checkpoint."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from aiockpt.cli.late_bar import LateBar
from aiockpt.cli.screen import console, counted, print_json, printable, size_text

if TYPE_CHECKING:
    from rich.console import Console

    from aiockpt.interchange.importing import Imported

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Import what was asked for; 0, or an error."""
    screen = None if args.json else console()
    from aiockpt.interchange.importing import import_checkpoint  # torch takes its time: not before rich was found

    with LateBar(f"reading {os.path.basename(os.path.abspath(args.source))}", is_shown=screen is not None) as bar:
        imported = import_checkpoint(
            args.source,
            args.run,
            step=args.step,
            part=args.part,
            on_total=bar.begin,
            on_progress=lambda nbytes: bar.advance(nbytes),
            on_saving=lambda: bar.wait(f"saving step {args.step}"),
        )
    if screen is None:
        print_json(imported)
    else:
        _show(screen, imported)
    return 0


def _show(screen: Console, imported: Imported) -> None:
    parts = ", ".join(imported.parts[:5]) + (", …" if len(imported.parts) > 5 else "")
    screen.print(
        f"step {imported.step}: {counted(imported.tensors, 'tensor')}, "
        f"{size_text(imported.nbytes)}, under {printable(parts)}, in {imported.path}",
        soft_wrap=True,
    )
