"""The number of trainers for this host, as a word: what it has, found without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from aiockpt.elastic.trainer_env import DEVICES, visible_devices
from aiockpt.errors import ConfigError

__all__ = ["nprocs_of"]

_GPU = re.compile("nvidia[0-9]+")


def nprocs_of(text: str, *, environ: Mapping[str, str], dev: Path = Path("/dev")) -> int:
    """Return the number of trainers that is asked for.

    Args:
        text: A number; ``"gpu"`` for one each GPU, ``"cpu"`` for one each CPU that this process may run on, ``"auto"``
            for the GPUs where there are any, else the CPUs.
        environ: The environment that the trainers inherit: ``CUDA_VISIBLE_DEVICES`` counts where it is set.
        dev: Where devices stand. In a container these are the ones that it was given, and sysfs shows all of the host.

    Raises:
        ConfigError: It is none of these, or there are no GPUs.
    """
    if text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0:
        return int(text)
    if text not in ("auto", "cpu", "gpu"):
        raise _refuse(f"{text!r} is neither a whole number of at least 1 nor one of auto, cpu, gpu", "give a number")
    gpus = 0 if text == "cpu" else _gpus(environ, dev)
    if text == "gpu" and not gpus:
        raise _refuse(f"no GPU is seen: {dev} has no nvidia0, or {DEVICES} hides it", 'give a number, or "cpu"')
    return gpus or len(os.sched_getaffinity(0))


def _gpus(environ: Mapping[str, str], dev: Path) -> int:
    present = sum(_GPU.fullmatch(name) is not None for name in os.listdir(dev))
    return min(present, len(visible_devices(environ[DEVICES]))) if DEVICES in environ else present


def _refuse(why: str, next: str) -> ConfigError:
    return ConfigError("nprocs was refused", why=why, next=next, argument="nprocs")
