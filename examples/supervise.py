"""Two trainers under one supervisor: one is killed, which stops the other; started again, both go on to the end.

    python examples/supervise.py

Each trains the demo's smallest model with a seed of its own, and saves into a run of its own. The supervisor imports
no torch. It needs no GPU.
"""

import asyncio
import os
import signal
import tempfile

import aiockpt
from aiockpt.elastic import DefaultLogsSpecs, RunProcsResult, Std, format_report, start_processes

RANKS = (0, 1)
STEPS = 40


def train(run: str, seed: int) -> list[float]:
    """Train to the end, saving every fifth step; returns the losses of the steps that were trained here."""
    from aiockpt.cli.demo_train import Training  # here, and not above: only the trainers need torch

    training = Training(size="tiny", steps=STEPS, seed=seed, device="cpu")
    losses = []
    with aiockpt.blocking.Checkpointer(run, keep=aiockpt.Latest(2), every=aiockpt.Every(steps=5)) as ckpt:
        resumed = ckpt.restore(training.state)
        print(f"resumed from step {resumed.step}" if resumed else "nothing to resume, beginning", flush=True)
        for step in range(resumed.step + 1 if resumed else 0, STEPS):
            losses.append(training.step())
            if ckpt.due(step):
                ckpt.save(step, training.state)
    return losses


def has_checkpoint(run: str) -> bool:
    """Return whether a run has one; it has its name once it is whole."""
    return os.path.isdir(run) and any(name.startswith("step-") for name in os.listdir(run))


async def supervise(directory: str, *, kill: bool) -> RunProcsResult:
    """Run both trainers to their end, or until one fails."""
    arguments = {rank: (f"{directory}/run-{rank}", rank) for rank in RANKS}
    environments: dict[int, dict[str, str]] = {rank: {} for rank in RANKS}
    logs = DefaultLogsSpecs(f"{directory}/logs", tee=Std.ALL)
    async with start_processes("trainer", train, arguments, environments, logs) as trainers:
        if kill:
            async with asyncio.timeout(120):
                while not has_checkpoint(f"{directory}/run-1"):  # noqa: ASYNC110 - a file system tells nobody
                    await asyncio.sleep(0.01)
            os.kill(trainers.pids()[1], signal.SIGKILL)  # as the kernel does when memory runs out
        result = await trainers.wait()
    assert result is not None  # there was no timeout
    return result


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="aiockpt-example-") as directory:
        killed = await supervise(directory, kill=True)
        print(format_report("trainer", killed.failures))
        again = await supervise(directory, kill=False)
        assert not again.is_failed()
        for rank, losses in again.return_values.items():
            print(f"trainer {rank} trained {len(losses)} of {STEPS} steps the second time")
        assert 0 < len(again.return_values[1]) < STEPS, "the killed trainer did not go on where it was"


if __name__ == "__main__":
    asyncio.run(main())
