"""Which names a restore is about: include and exclude patterns."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable

from aiockpt.errors import ConfigError
from aiockpt.state.patterns import Patterns, compile_patterns, pattern_texts

__all__ = ["ALL", "Patterns", "Selection"]


class Selection:
    """Takes the dotted names that some include pattern names and no exclude pattern does.

    Patterns are shell-like (``*``, ``?``, ``[seq]``; a ``*`` crosses dots). A pattern that fits a name also takes all
    that is below it, so ``model``, ``model.*`` and ``mod*`` each take ``model.layers.0.weight``, and
    ``*.layers.0`` takes that layer in the model and in the optimizer's state. What cannot be taken in part, an object
    or a value, goes by its own name or by a pattern for what is below it: ``rng`` and ``rng.*`` are the same.

    Args:
        include: One pattern or several; None takes every name.
        exclude: One pattern or several; stronger than ``include``.

    Raises:
        ConfigError: A pattern is no text, or is empty.
    """

    def __init__(self, include: Patterns = None, exclude: Patterns = None) -> None:
        includes, excludes = pattern_texts(include, "include"), pattern_texts(exclude, "exclude")
        self._includes = [(text, compile_patterns([text])) for text in includes] if include is not None else None
        self._include = None if include is None else compile_patterns(includes)
        self._exclude = compile_patterns(excludes) if excludes else None

    @property
    def everything(self) -> bool:
        """Whether no name is left out."""
        return self._include is None and self._exclude is None

    def takes(self, name: str) -> bool:
        """Tell whether the tensor or value of this dotted name is meant."""
        if self._exclude is not None and self._exclude.match(name):
            return False
        return self._include is None or self._include.match(name) is not None

    def takes_whole(self, name: str) -> bool:
        """Tell whether something is meant that can only be taken as a whole."""
        if self._exclude is not None and (self._exclude.match(name) or self._exclude.match(name + ".")):
            return False
        return self._include is None or any(self._include.match(text) for text in (name, name + "."))

    def idle_includes(self, names: Iterable[str]) -> list[str]:
        """Return the include patterns that fit none of ``names``: most likely misspelt."""
        idle = list(self._includes or ())
        for name in names:
            if not idle:
                break
            idle = [(text, pattern) for text, pattern in idle if not (pattern.match(name) or pattern.match(name + "."))]
        return [text for text, _ in idle]

    def refuse_idle(self, names: Collection[str], *, argument: str = "include") -> None:
        """Refuse an include pattern that fits none of ``names``, which are all that a checkpoint has.

        Args:
            names: Dotted.
            argument: What the caller calls the patterns.

        Raises:
            ConfigError: Says which.
        """
        idle = self.idle_includes(names)
        if idle:
            raise ConfigError(
                f"{argument} was refused: nothing is named {', '.join(map(repr, idle))}",
                why="the checkpoint has no such name",
                next=f"names are dotted, as in {', '.join(map(repr, itertools.islice(names, 3)))}",
                argument=argument,
            )


ALL = Selection()
"""Takes every name."""
