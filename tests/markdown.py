"""Fenced code of the Markdown pages, for the tests that run it."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from tests.support import ROOT

__all__ = ["Block", "blocks", "files"]

_FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """One fenced block."""

    page: str
    line: int
    """Of the fence, from 1: the code begins on the next one."""
    language: str
    title: str
    """The file that a reader would paste it to; empty where it is a fragment."""
    code: str

    def run(self, **names: Any) -> dict[str, Any]:
        """Run it as a script, with ``names`` at hand, and return what it leaves; tracebacks point into the page."""
        namespace = {"__name__": "__main__", **names}
        exec(compile("\n" * self.line + self.code, str(ROOT / self.page), "exec", dont_inherit=True), namespace)
        return namespace


def blocks(page: str, language: str) -> list[Block]:
    """Return the blocks of one language, in the order of the page."""
    text = (ROOT / page).read_text()
    found = (
        Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2] or "", match[3])
        for match in _FENCE.finditer(text)
    )
    return [block for block in found if block.language == language]


def files(page: str) -> dict[str, Block]:
    """Return the Python blocks of a page that have a title, by title."""
    titled = [block for block in blocks(page, "python") if block.title]
    assert len({block.title for block in titled}) == len(titled), f"{page} has two blocks of one title"
    return {block.title: block for block in titled}
