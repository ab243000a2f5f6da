"""A reader of the pages, who pastes their files into an empty folder and runs them."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import aiockpt
from tests.markdown import files
from tests.support import ROOT

RECIPES = files("docs/recipes.md")
MIGRATIONS = files("docs/migration.md")
FILES = RECIPES | MIGRATIONS
MODULES = ("training", "transformers_callback", "language_model", "lightning_callback", "lightning_module")
"""Files that others import."""


class Interrupted(Exception):
    """Ends a training in its middle."""


class Reader:
    """One folder with the pages' files in it."""

    def __init__(self, folder: Path, *, steps: int | None = None) -> None:
        """Paste the files; ``steps`` is what the reader makes of ``STEPS`` in training.py."""
        self.folder = folder
        folder.mkdir()
        for name, block in FILES.items():
            if name.endswith(".py"):
                (folder / name).write_text(block.code)
        if steps is not None:
            self.train_for(steps)

    def train_for(self, steps: int) -> None:
        """Change ``STEPS`` in training.py."""
        training = self.folder / "training.py"
        training.write_text(re.sub(r"STEPS = \d+", f"STEPS = {steps}", training.read_text()))

    def run(self, name: str, **names: Any) -> dict[str, Any]:
        """Run one of the files in this process and return what it leaves."""
        with self.inside():
            return FILES[name].run(**names)

    def run_interrupted(self, name: str, *, after: int) -> None:
        """Run one of the files until its optimizer has made so many steps."""
        with interruption(after=after):
            self.run(name)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Stand in the folder, with its modules in reach, and leave the process as it was."""
        before, random, threads = os.getcwd(), aiockpt.RNG().state_dict(), torch.get_num_threads()
        os.chdir(self.folder)
        sys.path.insert(0, str(self.folder))
        torch.set_num_threads(1)  # for such small tensors a second one only waits
        try:
            yield
        finally:
            os.chdir(before)
            sys.path.remove(str(self.folder))
            aiockpt.RNG().load_state_dict(random)
            torch.set_num_threads(threads)
            for module in MODULES:
                sys.modules.pop(module, None)

    @property
    def environment(self) -> dict[str, str]:
        """For a process that runs a file of the folder."""
        return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def interruption(*, after: int) -> Iterator[None]:
    """Interrupt the training in the block when optimizers have made so many steps."""
    made = 0

    def count(*_: object) -> None:
        nonlocal made
        made += 1
        if made == after:
            raise Interrupted

    hook = register_optimizer_step_post_hook(count)
    try:
        with pytest.raises(Interrupted):
            yield
    finally:
        hook.remove()
