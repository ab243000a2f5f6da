"""A run directory that goes away again where nothing is committed into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from aiockpt.format.names import LOCK_NAME, RUN_RECORD_NAME, parse_step, parse_term
from aiockpt.storage.commit import remove_tree
from aiockpt.storage.run_directory import open_run

__all__ = ["unless_it_fails"]

_OWN_NAMES = frozenset({RUN_RECORD_NAME, LOCK_NAME})


@contextmanager
def unless_it_fails(run: str) -> Iterator[None]:
    """Let the block make ``run`` and the directories above it; remove them where it fails.

    Only what an opened run has of its own is removed: where somebody else has saved into it meanwhile, it stays.
    """
    made: list[str] = []
    path = run
    while not os.path.lexists(path):
        made.append(path)
        path = os.path.dirname(path)
    try:
        yield
    except BaseException:
        with suppress(Exception):  # the failure is what counts; an empty run harms nobody
            _remove(made)
        raise


def _remove(made: list[str]) -> None:
    if not made:
        return
    run_fd = open_run(made[0])
    try:
        names = os.listdir(run_fd)
        if any(parse_step(name) is not None for name in names):
            return  # committed all the same, by us or by somebody else
        for name in names:
            if name.startswith(".trash."):
                remove_tree(run_fd, name)
            elif name in _OWN_NAMES or parse_term(name) is not None:
                os.unlink(name, dir_fd=run_fd)
    finally:
        os.close(run_fd)
    for path in made:
        os.rmdir(path)
