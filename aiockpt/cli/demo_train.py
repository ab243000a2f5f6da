"""The demo's trainer, a process of its own: trains, saves, says on a pipe what it did.

It is what a user's training script would be: restore, then a loop with ``save`` in it. As ``reference`` it trains the
same steps without being interrupted, with ``torch.save`` where the other run saves, to compare losses and times with.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import torch
from torch.nn import functional

import aiockpt
from aiockpt.cli.demo_model import GPT, SIZES, Windows, source_text

__all__ = ["main"]

_BATCH = 4
_THREADS = 2  # fixed, because sums in another number of threads round differently
Emit = Callable[..., None]


class Training:
    """A model in training, all of it deterministic from the seed."""

    def __init__(self, *, size: str, steps: int, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self.device = torch.device(device)
        self.model = GPT(*SIZES[size]).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=steps)
        self.windows = Windows(source_text(), batch=_BATCH, seed=seed)

    @property
    def state(self) -> dict[str, Any]:
        """All that the next step depends on, as it goes into a checkpoint."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "rng": aiockpt.RNG(),
            "data": self.windows,
        }

    def step(self) -> float:
        """Train one step and return its loss."""
        inputs, targets = (tokens.to(self.device) for tokens in self.windows.next_batch())
        loss = functional.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()

    def digest(self) -> str:
        """Return a hash of everything that the next step depends on."""
        digest = hashlib.sha256()
        _update(digest, self.model.state_dict())
        _update(digest, self.optimizer.state_dict())
        _update(digest, self.scheduler.state_dict())
        _update(digest, self.windows.state_dict())
        _update(digest, torch.get_rng_state())
        return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        whole = value.detach().cpu().contiguous()
        digest.update(ctypes.string_at(whole.data_ptr(), whole.nbytes))  # .numpy() needs numpy, which may be missing
    elif isinstance(value, dict):
        for key, item in value.items():
            digest.update(repr(key).encode())
            _update(digest, item)
    elif isinstance(value, list):
        for item in value:
            _update(digest, item)
    else:
        digest.update(repr(value).encode())


async def _train_with_checkpoints(args: argparse.Namespace, training: Training, emit: Emit) -> None:
    pending: list[aiockpt.Save[aiockpt.Saved]] = []
    async with aiockpt.Checkpointer(args.run, keep=aiockpt.Latest(3)) as checkpointer:
        resumed = await checkpointer.restore(training.state)
        emit("resumed", step=resumed.step if resumed else None, skipped=len(resumed.skipped) if resumed else 0)
        await checkpointer.prepare(training.state)
        for step in range(resumed.step + 1 if resumed else 0, args.steps):
            loss = training.step()
            emit("step", step=step, loss=loss.hex())
            pending = [save for save in pending if not await _reported(save, emit)]
            if (step + 1) % args.every == 0 or step + 1 == args.steps:
                emit("saving", step=step)
                pending.append(checkpointer.save(step, training.state))
        await checkpointer.wait_idle()
        for save in pending:
            await _reported(save, emit)
    emit("done", digest=training.digest())


async def _reported(save: aiockpt.Save[aiockpt.Saved], emit: Emit) -> bool:
    if not save.done():
        return False
    saved = await save
    times = {name: saved.timings[name] for name in ("blocked", "staged", "durable")}
    emit("saved", step=saved.step, nbytes=saved.nbytes, **times)
    return True


def _train_reference(args: argparse.Namespace, training: Training, emit: Emit) -> None:
    emit("resumed", step=None, skipped=0)
    file = Path(args.run)
    for step in range(args.steps):
        loss = training.step()
        emit("step", step=step, loss=loss.hex())
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            emit("saved", step=step, **_torch_save(training, file))
    file.unlink(missing_ok=True)
    emit("done", digest=training.digest())


def _torch_save(training: Training, file: Path) -> dict[str, float]:
    """Save the same state the usual way, durably, and return how long that held up the training."""
    start = time.perf_counter()
    state = {name: item.state_dict() for name, item in training.state.items() if name != "rng"}
    state["rng"] = torch.get_rng_state()
    with file.open("wb") as opened:
        torch.save(state, opened)
        opened.flush()
        os.fsync(opened.fileno())
    elapsed = time.perf_counter() - start
    return {"nbytes": file.stat().st_size, "blocked": elapsed, "staged": elapsed, "durable": elapsed}


def main(argv: list[str] | None = None) -> None:
    """Train; every event is a line of JSON on the descriptor ``--events``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--reference", action="store_true")
    for name in ("run", "size", "device"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("steps", "every", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args(argv)
    os.set_inheritable(args.events, False)
    with os.fdopen(args.events, "w", buffering=1) as events:

        def emit(event: str, **fields: Any) -> None:
            events.write(json.dumps({"event": event, **fields}) + "\n")

        _train(args, emit)


def _train(args: argparse.Namespace, emit: Emit) -> None:
    torch.set_num_threads(_THREADS)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for to be deterministic on CUDA
    torch.use_deterministic_algorithms(True)
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as exc:
        emit("refused", why=f"torch cannot use the device {args.device!r}: {str(exc).splitlines()[0]}")
        return
    training = Training(size=args.size, steps=args.steps, seed=args.seed, device=args.device)
    if args.reference:
        _train_reference(args, training, emit)
    else:
        anyio.run(_train_with_checkpoints, args, training, emit)


if __name__ == "__main__":
    main()
