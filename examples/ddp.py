"""Train under DistributedDataParallel: every rank has all of the state, and each writes its share of it.

    torchrun --standalone --nproc-per-node 4 examples/ddp.py RUN

Run it again, with as many ranks or another number of them, and it goes on. A SIGTERM to any one rank, or to torchrun,
makes all of them save the same step and end. It needs no GPU.
"""

import argparse
import os
import signal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import aiockpt

BATCH = 32  # samples of all ranks together


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    """Train on this rank's part of a step's samples; returns the loss over those of all ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(step)  # so no data position has to be saved
    x = torch.randn(BATCH, 256, generator=generator)[rank::world]
    loss = (model(x) - x.sin()).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()  # waits by itself for what a save still copies of its state
    mean = loss.detach() / world
    dist.all_reduce(mean)
    return mean.item()


def shares(step: str) -> str:
    """Return what each rank wrote of a checkpoint, by the names of its files."""
    sizes: dict[str, int] = {}
    for folder, _, files in os.walk(step):
        for name in files:
            if "-of-" in name:  # model-00002-of-00004.safetensors is of the second rank
                rank = name.split("-")[1]
                sizes[rank] = sizes.get(rank, 0) + os.path.getsize(os.path.join(folder, name))
    return ", ".join(f"{nbytes / 1e6:.1f} MB" for _, nbytes in sorted(sizes.items()))


def main(run: str, steps: int) -> None:
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 256))
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3)
    state = {"model": ddp, "optimizer": optimizer}  # saved as if there were no DDP: one process reads it as well

    every = aiockpt.Every(steps=20)
    with aiockpt.blocking.Checkpointer(run, keep=aiockpt.Latest(2), every=every) as ckpt:
        signal.signal(signal.SIGTERM, lambda *_: ckpt.request_save("SIGTERM"))  # safe in a signal handler
        resumed = ckpt.restore(state)
        if rank == 0:
            print(f"resumed from step {resumed.step}" if resumed else "nothing to resume, beginning", flush=True)
        ckpt.prepare(state)  # else the first save takes the time
        for step in range(resumed.step + 1 if resumed else 0, steps):
            loss = train_step(ddp, optimizer, step)
            if reason := ckpt.due(step):  # on all ranks at the same step
                save = ckpt.save(step, state)
                if rank == 0:
                    print(f"step {step}: loss {loss:.6f}, saving: {reason}", flush=True)
                    print(f"step {step}: the ranks wrote {shares(save.result().path)}", flush=True)
                if "SIGTERM" in reason:
                    break


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    try:
        main(args.run, args.steps)
    finally:
        dist.destroy_process_group()
