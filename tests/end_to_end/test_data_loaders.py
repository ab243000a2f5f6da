"""torchdata's StatefulDataLoader as a part of the state: an epoch that is cut goes on with the next batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from aiockpt import blocking

stateful_dataloader = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")

pytestmark = [
    pytest.mark.process,
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata's own
]

ROWS, BATCHES, CUT_AFTER = 40, 10, 3


class Rows(Dataset[torch.Tensor]):
    """Rows by number, which a shuffling sampler orders."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, index % 7, 1.0])


class Stream(IterableDataset[torch.Tensor]):
    """Rows one after another, whose place only the dataset itself knows, in each worker apart."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        while (row := first + step * self.at) < ROWS:
            self.at += 1
            yield Rows()[row]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


LOADERS: dict[str, Callable[[int], Any]] = {
    "shuffled": lambda workers: stateful_dataloader.StatefulDataLoader(
        Rows(), batch_size=4, shuffle=True, num_workers=workers
    ),
    "stream": lambda workers: stateful_dataloader.StatefulDataLoader(Stream(), batch_size=4, num_workers=workers),
}


class Epoch:
    """A model that learns from one loader, everything from one seed."""

    def __init__(self, kind: str, workers: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Linear(3, 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.loader = LOADERS[kind](workers)
        self.state = {"model": self.model, "optimizer": self.optimizer, "loader": self.loader}

    def train(self, batches: Iterator[torch.Tensor], count: int) -> list[tuple[list[list[float]], float]]:
        """Learn from so many batches; returns them with their losses."""
        seen = []
        for _, batch in zip(range(count), batches, strict=False):  # in this order: no batch is taken too many
            loss = self.model(batch).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            seen.append((batch.tolist(), loss.item()))
        return seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", LOADERS)
def test_an_epoch_that_was_cut(kind: str, workers: int, tmp_path: Path) -> None:
    """Every later batch and loss is that of the epoch that went on, bit for bit, with worker processes too."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        epoch = Epoch(kind, workers, seed=1)
        batches = iter(epoch.loader)
        assert len(epoch.train(batches, CUT_AFTER)) == CUT_AFTER
        ckpt.save(CUT_AFTER, epoch.state).result(60)
        expected = epoch.train(batches, ROWS)
        assert len(expected) == BATCHES - CUT_AFTER
        resumed = Epoch(kind, workers, seed=2)
        assert ckpt.restore(resumed.state) is not None
        assert resumed.train(iter(resumed.loader), ROWS) == expected
