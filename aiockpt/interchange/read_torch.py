"""Files of ``torch.save``, by the loader that executes nothing."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch

from aiockpt.errors import ConfigError
from aiockpt.interchange.foreign_file import ForeignFile, refused

__all__ = ["is_torch_file", "load_torch"]

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
"""Begins the files of torch before 1.6."""
_GLOBAL = re.compile(r"GLOBAL (\S+)")
_REASON = re.compile(r"WeightsUnpickler error:\s*(.+)")
_MOST_WHY = 200


def is_torch_file(file: ForeignFile) -> bool:
    """Tell whether a file is one of ``torch.save``, as far as its first bytes say."""
    return file.read(len(_ZIP)).startswith((_ZIP, _PICKLE))


def load_torch(file: ForeignFile) -> Any:
    """Return what the file holds, its tensors mapped where its format allows that.

    Raises:
        ConfigError: It is damaged, or needs code to be executed; none was.
    """
    is_zip = file.read(len(_ZIP)) == _ZIP
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickle protocols and TorchScript: either it loads, or it does not
            return torch.load(f"/proc/self/fd/{file.fd}", map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as exc:
        raise _refusal(file, str(exc)) from exc


def _refusal(file: ForeignFile, text: str) -> ConfigError:
    """Return the error; torch's own text also tells how to execute what is in the file."""
    if found := _GLOBAL.search(text):
        return refused(
            file.path,
            f"it holds pickled code or objects ({found[1]:.{_MOST_WHY}}), of which nothing was executed",
            "have a program that trusts it load it and save tensors and plain values alone",
        )
    reason = _REASON.search(text)
    why = reason[1] if reason else text.strip().partition("\n")[0].partition(". ")[0]
    return refused(
        file.path, f"torch.load(weights_only=True) does not take it: {why:.{_MOST_WHY}}", "take another copy of it"
    )
