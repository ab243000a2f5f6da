"""``python -m bench QUESTION``: the command line."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from bench.plot import Figure, draw
from bench.process import EntrantFailedError
from bench.results import Report
from bench.table import Column, render

__all__ = ["QUESTIONS", "Question", "load_questions", "main", "parser_of"]

QUESTIONS = ("save", "restore", "small", "interference", "gpu", "plan", "star", "ranks", "exchange", "processes")
"""Each is a module of this package."""


class Question(Protocol):
    """What such a module has. ``--dir``, ``--json`` and ``--plot`` are among the arguments that it adds."""

    HELP: str
    COLUMNS: Sequence[Column]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add what this question takes."""

    def measure(self, args: argparse.Namespace, say: Callable[[str], None]) -> Report:
        """Measure and return everything; raises EntrantFailedError where ours failed."""

    def figure(self, report: Report) -> Figure:
        """Return what to draw."""


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark and print its table; 1 where our own side failed."""
    questions = load_questions()
    args = parser_of(questions).parse_args(argv)
    question = questions[args.question]
    args.dir = args.dir.resolve()
    args.dir.mkdir(parents=True, exist_ok=True)
    try:
        report = question.measure(args, lambda text: print(f"... {text}", file=sys.stderr, flush=True))
    except EntrantFailedError as exc:
        print(f"aiockpt itself was not measured: {exc}", file=sys.stderr)
        return 1
    print(render(report, question.COLUMNS))
    if args.json is not None:
        report.write(args.json)
    if args.plot is not None:
        draw(question.figure(report), args.plot)
    return 0


def load_questions() -> dict[str, Question]:
    """Import the modules of all questions."""
    return {name: cast("Question", importlib.import_module(f"bench.{name}")) for name in QUESTIONS}


def parser_of(questions: dict[str, Question]) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure aiockpt beside floors and peers.")
    commands = parser.add_subparsers(dest="question", required=True, metavar="QUESTION")
    for name, question in questions.items():
        question.add_arguments(commands.add_parser(name, help=question.HELP, description=question.HELP))
    return parser


if __name__ == "__main__":
    sys.exit(main())
