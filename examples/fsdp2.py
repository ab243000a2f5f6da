"""Train a small transformer that FSDP2 has spread over several ranks, and go on with another number of them.

    torchrun --standalone --nproc-per-node 4 examples/fsdp2.py RUN
    torchrun --standalone --nproc-per-node 2 examples/fsdp2.py RUN

Kill the first one in the middle, with Ctrl-C or `kill -9`: the second one goes on from the newest checkpoint, each rank
with its part of model and optimizer as two ranks divide them. More ranks than before do as well. It needs no GPU.
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import aiockpt

VOCABULARY, LENGTH, WIDTH, LAYERS = 64, 16, 64, 2
BATCH = 16  # samples of all ranks together


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(
            # With dropout each rank draws numbers of its own, and other ranks draw others: then the losses of another
            # number of ranks are as good, but not the same.
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tokens(x) + self.positions
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return self.head(x.flatten(0, 1))


def samples(first: int, count: int) -> torch.Tensor:
    """Return made-up samples by their numbers: rows of tokens at a distance that differs by row."""
    numbers = torch.arange(first, first + count).unsqueeze(1)
    return (numbers * 7 + torch.arange(LENGTH + 1) * (numbers % 5 + 1)) % VOCABULARY


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> float:
    """Train on this rank's part of the samples from the ``first`` on; returns the loss over those of all ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = samples(first + rank * (BATCH // world), BATCH // world)
    loss = nn.functional.cross_entropy(model(rows[:, :-1]), rows[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()  # waits by itself for what a save still copies of its state
    mean = loss.detach() / world
    dist.all_reduce(mean)
    return mean.item()


def restore(ckpt: aiockpt.blocking.Checkpointer, state: dict) -> aiockpt.Restored | None:
    """Restore in place; ranks that were not there when it was saved have no random state in it, and keep their own."""
    saved = ckpt.load(include=["progress.ranks"]) if ckpt.latest() is not None else None
    is_new = saved is not None and dist.get_rank() >= saved["progress"]["ranks"]
    return ckpt.restore(state, exclude=["rng"] if is_new else None)


def main(run: str, steps: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights on all ranks, before each keeps its part
    model = Transformer()
    mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(1 + rank)

    progress = {"samples": 0, "ranks": world}  # where the data goes on, in numbers that hold for any number of ranks
    state = {"model": model, "optimizer": optimizer, "rng": aiockpt.RNG(), "progress": progress}
    with aiockpt.blocking.Checkpointer(run, keep=aiockpt.Latest(3)) as ckpt:
        resumed = restore(ckpt, state)
        progress["ranks"] = world
        if rank == 0:
            print(f"resumed from step {resumed.step}" if resumed else "nothing to resume, beginning", flush=True)
        ckpt.prepare(state)  # else the first save takes the time
        for step in range(resumed.step + 1 if resumed else 0, steps):
            loss = train_step(model, optimizer, progress["samples"])
            progress["samples"] += BATCH
            if rank == 0:
                print(f"step {step}: loss {loss:.6f}", flush=True)
            if (step + 1) % 5 == 0 or step + 1 == steps:
                ckpt.save(step, state)  # no rank waits for another here
    # Leaving the block has waited until all is durable, and would have raised what failed.


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    try:
        main(args.run, args.steps)
    finally:
        dist.destroy_process_group()
