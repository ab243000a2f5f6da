"""The entry point: arguments in, exit status out.

Status 0 is success, 1 a finding (a bad checkpoint, a demo that is not bit-exact), 2 anything that kept the command from
its work, told in one line on standard error. Commands are imported when they run: ``ls`` needs no torch, ``--json`` no
rich.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from aiockpt._version import __version__
from aiockpt.cli.screen import MissingExtraError
from aiockpt.errors import CheckpointError

__all__ = ["main"]

_TROUBLE = 2
_COMMANDS = {
    "ls": "aiockpt.cli.ls",
    "verify": "aiockpt.cli.verify",
    "rm": "aiockpt.cli.rm",
    "demo": "aiockpt.cli.demo",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = _parser().parse_args(argv)
    try:
        status: int = importlib.import_module(_COMMANDS[args.command]).run(args)
        sys.stdout.flush()
    except (CheckpointError, MissingExtraError) as exc:
        return _say(exc)
    except BrokenPipeError:  # the reader has seen enough, as in "aiockpt ls RUN | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to fail at exit
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return status


def _say(error: Exception) -> int:
    """Print an error in one line."""
    parts = [error.what, error.why, error.next] if isinstance(error, CheckpointError) else [str(error)]
    print("aiockpt:", "; ".join(" ".join(part.split()) for part in parts if part), file=sys.stderr)
    return _TROUBLE


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(_TROUBLE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="aiockpt", description="Look at, check and remove checkpoints; see saving at work.")
    parser.add_argument("--version", action="version", version=f"aiockpt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_ls(commands)
    _add_verify(commands)
    _add_rm(commands)
    _add_demo(commands)
    return parser


def _add_ls(commands: argparse._SubParsersAction[_Parser]) -> None:
    ls = commands.add_parser("ls", help="list the checkpoints of a run", description="List a run's checkpoints.")
    _add_run(ls)


def _add_verify(commands: argparse._SubParsersAction[_Parser]) -> None:
    verify = commands.add_parser(
        "verify",
        help="read checkpoints and compare all checksums",
        description="Read a checkpoint whole, the newest unless told otherwise, and compare every checksum. "
        "Exit status 1 says that one is bad.",
    )
    _add_run(verify)
    which = verify.add_mutually_exclusive_group()
    which.add_argument("--step", type=_step, metavar="N", help="this step instead of the newest")
    which.add_argument("--all", action="store_true", help="every step")


def _add_rm(commands: argparse._SubParsersAction[_Parser]) -> None:
    rm = commands.add_parser(
        "rm",
        help="remove one checkpoint",
        description="Remove one checkpoint, at once out of sight, then from the disk. A job that saves into the run is "
        "not disturbed; a checkpoint that somebody reads is left, with exit status 2.",
    )
    _add_run(rm)
    rm.add_argument("step", type=_step, metavar="STEP", help="training step")
    rm.add_argument("--bad", action="store_true", help="remove what a restore found bad of this step, and only that")


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="train, be killed in the middle of a save, resume bit for bit",
        description="Train a small GPT on the source text of Python's standard library, saving every few steps; kill "
        "the trainer in the middle of a save, start it again, and compare every later loss with that of a run that "
        "nobody killed. Exit status 1 says that they differ.",
    )
    demo.add_argument("--steps", type=_count, default=24, help="training steps (default %(default)s)")
    demo.add_argument(
        "--size", choices=("tiny", "small", "medium"), default="small", help="of the model: 1, 10 or 50 M parameters"
    )
    demo.add_argument("--dir", metavar="DIR", help="keep the run's directories here (default: a temporary directory)")
    demo.add_argument("--seed", type=_step, default=0, help="of model, data and dropout (default %(default)s)")
    demo.add_argument("--device", default="cpu", help="cpu (default) or cuda")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory, as given to Checkpointer")
    parser.add_argument("--json", action="store_true", help="print JSON; needs no extra")


def _step(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _count(text: str) -> int:
    if _step(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
