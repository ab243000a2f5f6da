"""Ctrl-C in the middle of training, then again from the newest checkpoint: the losses are those of one quiet run.

    python examples/resume_after_interrupt.py

It sends the SIGINT to itself. What was being saved then is finished on the way out; the KeyboardInterrupt goes on.
"""

import os
import signal
import tempfile

import torch
from torch import nn

import aiockpt

STEPS = 20


def train(run: str, *, interrupt_at: int | None = None) -> dict[int, float]:
    """Train to the end and return the loss of each step that was trained here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 512), nn.Dropout(0.1), nn.GELU(), nn.Linear(512, 128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = {"model": model, "optimizer": optimizer, "rng": aiockpt.RNG()}
    losses: dict[int, float] = {}
    try:
        with aiockpt.blocking.Checkpointer(run, keep=aiockpt.Latest(2)) as ckpt:
            resumed = ckpt.restore(state)
            if resumed:
                print(f"resumed from step {resumed.step}")
            for step in range(resumed.step + 1 if resumed else 0, STEPS):
                x = torch.randn(32, 128)  # from the random state that the checkpoint holds
                loss = (model(x) - x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[step] = loss.item()
                if (step + 1) % 5 == 0:
                    ckpt.save(step, state)
                if step == interrupt_at:
                    os.kill(os.getpid(), signal.SIGINT)  # the user presses Ctrl-C
    except KeyboardInterrupt:
        print(f"interrupted after step {max(losses)}")
    return losses


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="aiockpt-example-") as directory:
        quiet = train(f"{directory}/quiet")
        before = train(f"{directory}/interrupted", interrupt_at=11)
        after = train(f"{directory}/interrupted")
    assert before | after == quiet, "the interrupted run went another way"
    print(f"all {len(quiet)} losses are equal, bit for bit")


if __name__ == "__main__":
    main()
