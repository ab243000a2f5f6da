"""A reader of docs/recipes.md, who pastes its files into an empty folder and runs them."""

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
MODULES = ("training", "transformers_callback", "lightning_callback")
"""Files of the page that others import."""


class Interrupted(Exception):
    """Ends a training in its middle."""


class Reader:
    """One folder with the page's files in it."""

    def __init__(self, folder: Path, *, steps: int | None = None) -> None:
        """Paste the files; ``steps`` is what the reader makes of ``STEPS`` in training.py."""
        self.folder = folder
        folder.mkdir()
        for name, block in RECIPES.items():
            if name.endswith(".py"):
                (folder / name).write_text(block.code)
        if steps is not None:
            training = folder / "training.py"
            training.write_text(re.sub(r"STEPS = \d+", f"STEPS = {steps}", training.read_text()))

    def run(self, name: str, **names: Any) -> dict[str, Any]:
        """Run one of the files in this process and return what it leaves."""
        with self.inside():
            return RECIPES[name].run(**names)

    def run_interrupted(self, name: str, *, after: int) -> None:
        """Run one of the files until its optimizer has made so many steps."""
        made = 0

        def count(*_: object) -> None:
            nonlocal made
            made += 1
            if made == after:
                raise Interrupted

        hook = register_optimizer_step_post_hook(count)
        try:
            with pytest.raises(Interrupted):
                self.run(name)
        finally:
            hook.remove()

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
