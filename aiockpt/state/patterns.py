"""Shell-like patterns over dotted names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from aiockpt.errors import ConfigError

__all__ = ["Patterns", "compile_patterns", "pattern_texts"]

Patterns = str | Iterable[str] | None


def pattern_texts(patterns: Patterns, argument: str) -> list[str]:
    """Return one pattern or several as a list.

    Args:
        patterns: As they were given.
        argument: What the caller calls them.

    Raises:
        ConfigError: A pattern is no text, or is empty.
    """
    given: object = () if patterns is None else patterns
    texts = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ConfigError(
                f"{argument} was refused",
                why=f"{text!r} is no pattern",
                next=f'give dotted names with wildcards, as in {argument}=["model.*"]',
                argument=argument,
            )
    return [str(text) for text in texts]


def compile_patterns(texts: Sequence[str]) -> re.Pattern[str]:
    """Return what matches a dotted name that one of the patterns names, or that is below such a name."""
    # translate() ends with \Z (\z from Python 3.14 on), two characters that give way to "or all that is below"
    return re.compile("|".join(rf"(?:{fnmatch.translate(text)[:-2]}(?s:\..*)?\Z)" for text in texts) or r"(?!)")
