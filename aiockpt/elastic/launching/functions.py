"""A function as something to launch, each rank in a fresh interpreter: what it is sent, and what comes back."""

from __future__ import annotations

import contextlib
import multiprocessing.spawn
import os
import pickle
import signal
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

from aiockpt.elastic.launching.child import LENGTH, STACKS_FD, STACKS_SIGNAL, VALUE_FD
from aiockpt.elastic.launching.interpreter import boot
from aiockpt.elastic.launching.programs import Command
from aiockpt.elastic.launching.values import ValueChannel
from aiockpt.errors import CheckpointError, ConfigError
from aiockpt.worker.launch import import_path

__all__ = ["Functions"]


class Functions:
    """One function, with arguments by rank.

    Tensors go by value, both ways.

    Raises:
        ConfigError: The function or an argument cannot be pickled.
    """

    owes_value = True

    def __init__(self, name: str, function: Callable[..., Any], args: Mapping[int, tuple[Any, ...]]) -> None:
        self._payloads = _payloads(name, function, args)
        self._channels: dict[int, ValueChannel] = {}

    def open(self) -> None:
        """Make a channel to each process.

        Raises:
            CheckpointError: The operating system refused.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            while self._payloads:
                rank, payload = self._payloads.popitem()
                try:
                    self._channels[rank] = ValueChannel(payload)
                except OSError as exc:
                    raise CheckpointError(
                        f"no process was started: no socket was opened to that of local rank {rank}",
                        why=f"{exc.strerror} (errno {exc.errno})",
                        next="raise the limit of descriptors (ulimit -n): a function takes three until it runs",
                    ) from exc
            stack.pop_all()

    def command(self, rank: int) -> Command:
        """Return an interpreter like this one, and the child's ends of its channel.

        ``-P``: a file random.py in the working directory must not be imported before our path is there.
        """
        flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing does
        argv = boot("aiockpt.elastic.launching.child", "-P", *flags, path=import_path())
        value, stacks = self._channels[rank].descriptors()
        return Command(argv[0], argv, {VALUE_FD: value, STACKS_FD: stacks})

    def release(self, rank: int) -> None:
        """Close the child's end here."""
        self._channels[rank].release()

    async def talk(self, rank: int) -> None:
        """Send function and arguments, receive the value."""
        await self._channels[rank].run()

    def settle(self, rank: int) -> bool:
        """Return whether all of the value came."""
        self._channels[rank].drain()
        return self._channels[rank].value is not None

    def value(self, rank: int) -> Any:
        """Return what the function returned; raises what unpickling it raises."""
        data = self._channels[rank].value
        assert data is not None
        return pickle.loads(data)

    def stacks_signal(self, pid: int) -> signal.Signals | int:
        """Return the signal for which the child has registered."""
        return STACKS_SIGNAL

    def stacks(self, rank: int, output_tail: str) -> str:
        """Return what the child wrote."""
        return self._channels[rank].stacks()

    def close(self) -> None:
        """Close all channels."""
        for channel in self._channels.values():
            channel.close()


def _payloads(name: str, function: Callable[..., Any], args: Mapping[int, tuple[Any, ...]]) -> dict[int, bytes]:
    """Return what each process is sent: how to prepare its main module, then the function and its arguments."""
    preparation = multiprocessing.spawn.get_preparation_data(name)
    preparation["authkey"] = bytes(preparation["authkey"])
    preparation["dir"] = os.getcwd()
    head = pickle.dumps(preparation)
    made = {}
    for rank, own in args.items():
        try:
            body = pickle.dumps((function, tuple(own)), protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as exc:
            raise ConfigError(
                f"{name} was not started: the function or the arguments of local rank {rank} cannot be pickled",
                why=f"{type(exc).__name__}: {exc}",
                next="pass a function of a module (no lambda, no local one) and plain values, or start a program",
            ) from exc
        made[rank] = LENGTH.pack(len(head)) + head + LENGTH.pack(len(body)) + body
    return made
