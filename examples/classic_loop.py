"""Train in a classic script, without asyncio: save now and then, and once more before a planned stop.

    python examples/classic_loop.py [RUN]

A SIGTERM, as batch systems send before they take the machine away, makes one more checkpoint before it ends.
"""

import signal
import sys
import tempfile

import torch
from torch import nn

import aiockpt

STEPS = 60


def main(run: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    progress = {"losses": []}
    state = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "rng": aiockpt.RNG(),
        "progress": progress,
    }
    stopping = False

    every = aiockpt.Every(steps=20, minutes=10)
    with aiockpt.blocking.Checkpointer(run, keep=aiockpt.Latest(2), every=every) as ckpt:

        def on_sigterm(*_: object) -> None:
            nonlocal stopping
            stopping = True
            ckpt.request_save("SIGTERM")  # safe in a signal handler

        signal.signal(signal.SIGTERM, on_sigterm)
        resumed = ckpt.restore(state)
        for step in range(resumed.step + 1 if resumed else 0, STEPS):
            x = torch.randn(64, 256)
            loss = (model(x) - x.sin()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            progress["losses"].append(loss.item())
            if reason := ckpt.due(step):
                print(f"step {step}: loss {loss.item():.4f}, saving: {reason}")
                ckpt.save(step, state)
                if stopping:
                    print(f"stopping after step {step}")
                    break
        ckpt.wait_idle()
        print(f"{len(progress['losses'])} losses in {run}, checkpoints {ckpt.steps()}")
    # Leaving the block has waited until all is durable, and would have raised what failed.


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="aiockpt-example-"))
