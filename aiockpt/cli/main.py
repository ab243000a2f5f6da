# PYTHON_ARGCOMPLETE_OK
"""The entry point: arguments in, exit status out.

Status 0 is success, 1 a finding (a bad checkpoint, a demo that is not bit-exact), 2 anything that kept the command from
its work, told in one line on standard error; ``spawn`` ends as its trainers do. Commands are imported when they run:
``ls`` needs no torch, ``--json`` no rich.
"""

from __future__ import annotations

import codecs
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence

from aiockpt.cli import completion
from aiockpt.cli.arguments import TROUBLE, make_parser
from aiockpt.cli.screen import MissingExtraError, in_old_encoding, printable
from aiockpt.errors import CheckpointCorruptError, CheckpointError

__all__ = ["main"]

_COMMANDS = {
    "ls": "aiockpt.cli.ls",
    "inspect": "aiockpt.cli.inspect",
    "diff": "aiockpt.cli.diff",
    "verify": "aiockpt.cli.verify",
    "rm": "aiockpt.cli.rm",
    "export": "aiockpt.cli.export",
    "import": "aiockpt.cli.import_",
    "spawn": "aiockpt.cli.spawn",
    "demo": "aiockpt.cli.demo",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = make_parser()
    completion.answer(parser)
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("aiockpt", in_old_encoding)
        sys.stdout.reconfigure(errors="aiockpt")
    try:
        status: int = importlib.import_module(_COMMANDS[args.command]).run(args)
        sys.stdout.flush()
    except (CheckpointError, MissingExtraError) as exc:
        return _say(exc)
    except RecursionError:  # of a tree in a damaged or hostile manifest; what was saved is not that deep
        return _say(CheckpointCorruptError("the checkpoint is nested too deep to be shown", next="look at another one"))
    except BrokenPipeError:  # the reader has seen enough, as in "aiockpt ls RUN | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to fail at exit
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return status


def _say(error: Exception) -> int:
    """Print an error in one line."""
    parts = [error.what, error.why, error.next] if isinstance(error, CheckpointError) else [str(error)]
    text = "; ".join(" ".join(part.split()) for part in parts if part)
    print("aiockpt:", printable(text), file=sys.stderr)
    return TROUBLE
