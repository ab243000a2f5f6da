"""The recipe for Lightning: a Trainer that is cut and resumed ends like one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiockpt import blocking
from tests.recipes.reader import Reader, interruption
from tests.state.rebuild import same

pytest.importorskip("lightning", reason="lightning is not installed")

pytestmark = [
    pytest.mark.process,
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata's own
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),  # Lightning's own, as torch changed
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # advice
]


def test_a_trainer_that_was_cut_ends_like_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut in the middle of an epoch and behind the end of one; ten steps are one epoch, every fifth is due."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # the recipe sets it
    whole, cut = Reader(tmp_path / "whole"), Reader(tmp_path / "cut")
    whole.run("lightning_train.py")
    cut.run_interrupted("lightning_train.py", after=8)  # saved: 4
    cut.run_interrupted("lightning_train.py", after=8)  # from 5 to 12, saved: 10
    assert blocking.steps(cut.folder / "runs/lightning") == [4, 10]
    cut.run("lightning_train.py")
    run = "runs/lightning"
    assert blocking.steps(whole.folder / run) == blocking.steps(cut.folder / run) == [4, 10, 14, 20, 24, 29]
    assert same(blocking.load(whole.folder / run), blocking.load(cut.folder / run))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")  # its ModelCheckpoint is gone
def test_a_file_of_lightning_is_brought_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on behind Lightning's own checkpoint, and saves through the callback from there on."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # the recipe sets it
    reader = Reader(tmp_path / "reader")
    with reader.inside():
        import lightning
        from lightning.pytorch.callbacks import ModelCheckpoint
        from lightning_module import Module, build_loader  # type: ignore[import-not-found]  # the reader's

        theirs = ModelCheckpoint(dirpath="checkpoints", filename="last", every_n_train_steps=13)
        trainer = lightning.Trainer(max_epochs=3, logger=False, callbacks=[theirs], accelerator="cpu")
        with interruption(after=14):
            trainer.fit(Module(), build_loader())
    trained = reader.run("lightning_bring.py")["trainer"]
    assert trained.global_step == 30
    assert blocking.steps(reader.folder / "runs/lightning") == [14, 20, 24, 29]
    assert reader.run("lightning_bring.py")["trainer"].global_step == 30
