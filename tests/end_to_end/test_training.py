"""Training beside saves: the same losses, snapshots as of the call, and torn ones that never become checkpoints."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import aiockpt
from aiockpt import blocking
from tests.helpful import assert_helpful
from tests.restoring.test_resume import VARIANTS, Run

pytestmark = pytest.mark.process


def test_every_optimizer_trains_alike_with_saves_and_steps_on_at_once(tmp_path: Path) -> None:
    """Losses are those of a training that never saves; what is restored goes on as from the call of the last save."""
    with blocking.Checkpointer(tmp_path, keep=aiockpt.Latest(1)) as ckpt:
        for number, (name, arguments) in enumerate(VARIANTS):
            alone, run, resumed = Run(name, arguments), Run(name, arguments), Run(name, arguments, seed=1)
            for turn in range(3):
                assert run.train(1) == alone.train(1), (name, arguments)
                save = ckpt.save(10 * number + turn, run.state)
            expected = alone.train(4)
            assert run.train(4) == expected, (name, arguments)  # the first of these steps comes at once
            save.result(60)
            assert ckpt.restore(resumed.state) is not None
            assert resumed.train(4) == expected, (name, arguments)


class Scene:
    """A model that is large enough to be copied behind the training thread, whose next save is so."""

    def __init__(self, ckpt: blocking.Checkpointer) -> None:
        torch.manual_seed(0)
        self.ckpt = ckpt
        self.model = nn.Linear(600, 600, bias=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.state = {"model": self.model, "optimizer": self.optimizer}
        self.step = -1
        self.train()
        self.save().result(60)
        self.train()

    def train(self) -> None:
        self.model.weight.grad = torch.ones_like(self.model.weight)
        self.optimizer.step()

    def save(self) -> Any:
        self.step += 1
        return self.ckpt.save(self.step, self.state)

    @contextlib.contextmanager
    def copies_held(self) -> Iterator[None]:
        """Let nothing be copied behind the thread that saves until the block ends."""
        gate = threading.Event()
        self.ckpt._coordinator._stager._thread.post(lambda: gate.wait(60))
        try:
            yield
        finally:
            gate.set()

    def swap(self) -> torch.Tensor:
        """Put other weights in the place of the model's, as an average for an evaluation; returns what was there."""
        before = self.model.weight.detach().clone()
        self.model.weight.data.copy_(torch.zeros_like(before))
        return before


def test_a_torn_snapshot_is_never_committed(tmp_path: Path) -> None:
    """A write that nobody waited for fails the save by the handle; what stood stands, and the next save is whole."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        scene = Scene(ckpt)
        with scene.copies_held():
            save = scene.save()
            scene.swap()
        with pytest.raises(aiockpt.TornSnapshotError) as caught:
            save.result(60)
        assert_helpful(caught.value, aiockpt.TornSnapshotError, step=1, keys=("model.weight",))
        assert ckpt.steps() == [0]
        scene.train()
        scene.save().result(60)
        assert torch.equal(ckpt.load(2)["model"]["weight"], scene.model.weight)
        assert ckpt.statistics().failed == 1


@pytest.mark.parametrize("how", ["guarded", "inline"])
def test_a_swap_that_is_allowed(how: Any, tmp_path: Path) -> None:
    """Right behind ``wait_staged()``, and at once with ``snapshot="inline"``: the weights of the call are saved."""
    with blocking.Checkpointer(tmp_path, snapshot=how) as ckpt:
        scene = Scene(ckpt)
        for _ in range(3):
            save = scene.save()
            if how == "guarded":
                save.wait_staged()
            before = scene.swap()
            save.result(60)
            assert torch.equal(ckpt.load(scene.step)["model"]["weight"], before)
            scene.train()


def test_a_step_waits_for_its_own_copies_only(tmp_path: Path) -> None:
    """Behind the call of a guarded save the optimizer's step waits until they are done; the snapshot is the call's."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        scene = Scene(ckpt)
        before = scene.model.weight.detach().clone()
        with scene.copies_held():
            save = scene.save()
            stepping = threading.Thread(target=scene.train)
            stepping.start()
            stepping.join(0.1)
            assert stepping.is_alive(), "the step did not wait"
            assert torch.equal(scene.model.weight, before)
        stepping.join(60)
        save.result(60)
        assert not torch.equal(scene.model.weight, before)
        assert torch.equal(ckpt.load(scene.step)["model"]["weight"], before)
