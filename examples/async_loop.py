"""Train under asyncio; another task tells when each checkpoint is durable.

    python examples/async_loop.py [RUN]

Run it twice with the same RUN: the second time it resumes where the first one ended.
"""

import asyncio
import sys
import tempfile

import torch
from torch import nn

import aiockpt

STEPS_PER_RUN = 30


async def tell(save: aiockpt.Save) -> None:
    saved = await save  # durable
    times = saved.timings
    print(
        f"step {saved.step}: {saved.nbytes / 1e6:.0f} MB, held up training {times['blocked'] * 1e3:.1f} ms, "
        f"durable after {times['durable'] * 1e3:.0f} ms"
    )


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    x = torch.randn(64, 512)
    loss = (model(x) - x.square()).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()  # waits by itself for what a save still copies of its state
    return loss.item()


async def main(run: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = {"model": model, "optimizer": optimizer, "rng": aiockpt.RNG()}

    async with aiockpt.Checkpointer(run, keep=aiockpt.Latest(3)) as ckpt, asyncio.TaskGroup() as tasks:
        resumed = await ckpt.restore(state)  # in place; None where there is nothing yet
        first = resumed.step + 1 if resumed else 0
        print(f"resumed from step {resumed.step}" if resumed else "nothing to resume, beginning")
        await ckpt.prepare(state)  # else the first save takes the time
        for step in range(first, first + STEPS_PER_RUN):
            loss = await asyncio.to_thread(train_step, model, optimizer)
            if (step + 1) % 10 == 0:
                await ckpt.wait_ready()  # save() would hold the loop while the save before is being written
                print(f"step {step}: loss {loss:.4f}, saving")
                tasks.create_task(tell(ckpt.save(step, state)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="aiockpt-example-")))
