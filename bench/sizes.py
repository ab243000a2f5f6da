"""Sizes and durations as people write and read them."""

from __future__ import annotations

import argparse
import re

__all__ = ["gigabytes_per_second", "seconds_text", "size_argument", "size_text"]

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def size_argument(text: str) -> int:
    """Return the bytes that ``2GiB``, ``64MiB`` or ``1000`` stands for.

    Raises:
        argparse.ArgumentTypeError: It stands for nothing.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write it as 64MiB or 2GiB")
    return int(float(match[1]) * unit)


def size_text(nbytes: float) -> str:
    """Return bytes as people read them, to three digits."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def seconds_text(seconds: float | None) -> str:
    """Return a duration to three digits: milliseconds below one second."""
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def gigabytes_per_second(nbytes: int, seconds: float) -> float:
    """Return the rate in GB/s, 10**9 bytes each."""
    return nbytes / seconds / 1e9 if seconds > 0 else 0.0
