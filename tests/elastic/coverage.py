"""The table from requirements and weaknesses to the tests that show them, made of the tests' docstrings.

``python -m tests.elastic.coverage`` writes it. The numbers are those under which the behaviour of torch's elastic
module was written down: R for what it does, E for where it fails.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE / "coverage.md"

_LAST = {"MP": 49, "RE": 8, "TL": 12, "ER": 16, "NU": 15}
NUMBERS = [
    *(f"R-{part}-{n}" for part, last in _LAST.items() for n in range(1, last + 1)),
    *(f"E-{n}" for n in (*range(30, 72), 107, 108, 109)),
]

OUT = {
    "R-MP-30": "signals that are passed on without stopping belong to the agent",
    "R-MP-47": "Linux alone",
    "R-RE-3": "there is no public `redirect` to nest",
    "R-RE-4": "Linux alone",
    "R-NU-11": "processors are bound, memory is not",
    "R-NU-12": "GPUs are counted from sysfs; `CUDA_VISIBLE_DEVICES` is not followed",
    "R-NU-14": "every GPU of a node has its share of it",
    "E-57": "as R-MP-30",
}
"""What is left out on purpose, and why."""

_NUMBER = re.compile(r"\b(?:R-[A-Z]{2}-\d+|E-\d+)\b")
_IN_BRACKETS = re.compile(r"\s*\([^()]*\b(?:R-[A-Z]{2}|E)-\d+[^()]*\)")


def shown() -> dict[str, list[tuple[str, str]]]:
    """Return the tests by number: each as its id, and the sentence of its docstring."""
    found = defaultdict(list)
    for path in sorted(HERE.glob("test_*.py")):
        for name, docstring in _tests_in(ast.parse(path.read_text()), path.name):
            said = " ".join(docstring.split())
            for number in _NUMBER.findall(said):
                found[number].append((name, _IN_BRACKETS.sub("", said)))
    return dict(found)


def _tests_in(node: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, str]]:
    for inner in node.body:
        if isinstance(inner, ast.ClassDef):
            yield from _tests_in(inner, f"{name}::{inner.name}")
        elif isinstance(inner, ast.FunctionDef) and inner.name.startswith("test_"):
            yield f"{name}::{inner.name}", ast.get_docstring(inner) or ""


def table() -> str:
    """Return the page."""
    tests = shown()
    rows = []
    for number in NUMBERS:
        if number in OUT:
            rows.append(f"| {number} | out | {OUT[number]} |")
        for test, what in tests.get(number, []):
            rows.append(f"| {number} | `{test}` | {what} |")
    head = "# What the tests of `aiockpt.elastic` show\n\nMade by `python -m tests.elastic.coverage`.\n\n"
    return head + "| number | test | what it shows |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(table())
