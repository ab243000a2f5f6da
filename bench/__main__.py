"""``python -m bench save|restore``: the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import runner
from bench.entrant import OURS, RESTORES, SAVES
from bench.machine import facts
from bench.process import EntrantFailedError
from bench.results import Report
from bench.sizes import size_argument
from bench.table import render

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark and print its table; 1 where our own side failed."""
    args = _arguments(argv)
    plan = runner.Plan(
        question=args.question,
        state=args.state,
        size=args.size,
        rounds=args.rounds,
        warmup=args.warmup,
        directory=args.dir.resolve(),
        peers=_peers(args.peers, args.question),
    )
    plan.directory.mkdir(parents=True, exist_ok=True)
    try:
        outcome = runner.run(plan, lambda text: print(f"... {text}", file=sys.stderr, flush=True))
    except EntrantFailedError as exc:
        print(f"aiockpt itself was not measured: {exc}", file=sys.stderr)
        return 1
    report = Report(
        question=args.question,
        machine=facts(plan.directory),
        args={name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        floors=outcome.floors,
        rows=[measured.row(args.question) for measured in outcome.measured],
        skipped=outcome.skipped,
        notes=outcome.notes,
    )
    print(render(report))
    if args.json is not None:
        report.write(args.json)
    if args.plot is not None:
        from bench.plot import draw  # here, so that a run without a figure needs no matplotlib

        draw(report, args.plot)
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure aiockpt beside floors and peers.")
    parser.add_argument("question", choices=("save", "restore"), help="what to measure")
    parser.add_argument("--size", type=size_argument, default="2GiB", help="bytes of the state (default 2GiB)")
    parser.add_argument(
        "--state", choices=("gpt", "many"), default="gpt", help="a GPT with AdamW, or many tensors of 4 KiB"
    )
    parser.add_argument("--rounds", type=_count, default=5, help="timed rounds of each system (default 5)")
    parser.add_argument("--warmup", type=_count, default=1, help="rounds before them (default 1)")
    parser.add_argument("--peers", default="all", help="names separated by commas, all, or none (default all)")
    parser.add_argument("--dir", type=Path, default=Path("."), help="where to write, on the disk to measure")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them here")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _peers(text: str, question: str) -> tuple[str, ...] | None:
    if text == "all":
        return None
    names = () if text == "none" else tuple(name.strip() for name in text.split(","))
    known = {key.system for key in (SAVES if question == "save" else RESTORES)} - {OURS.system}
    unknown = sorted(set(names) - known)
    if unknown:
        print(f"unknown peers {', '.join(unknown)}; there are: {', '.join(sorted(known))}", file=sys.stderr)
        raise SystemExit(2)
    return names


if __name__ == "__main__":
    sys.exit(main())
