"""Names: of entries in a checkpoint, and of what lies in a run directory."""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

__all__ = [
    "EXTRA",
    "INDEX_NAME",
    "LOCK_NAME",
    "MANIFEST_NAME",
    "MAX_STEP",
    "RUN_RECORD_NAME",
    "Attempt",
    "Segments",
    "attempt_name",
    "bad_name",
    "dotted",
    "file_name",
    "meet_name",
    "old_name",
    "parse_attempt",
    "parse_bad",
    "parse_meet",
    "parse_old",
    "parse_step",
    "parse_term",
    "shard_name",
    "sort_key",
    "step_name",
    "term_name",
    "trash_name",
]

Segments = tuple[str, ...]
"""The path of an entry: mapping keys and list indices as text. Dotted text is for people, globs and files."""

MANIFEST_NAME = "manifest.json"
EXTRA = ".extra"
"""In the name of a file of undeclared tensors; nothing else that we name in a folder has it."""
INDEX_NAME = "model.safetensors.index.json"
RUN_RECORD_NAME = "aiockpt.json"
LOCK_NAME = ".lock"
MAX_STEP = (1 << 63) - 1
"""What fits the wire, the manifest and the 19 digits of a name."""

_LONGEST = 200  # bytes; NAME_MAX is 255 on every file system of interest, and prefixes come on top
_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-+@=")


def dotted(segments: Segments) -> str:
    """Return the name for people, globs and file headers."""
    return ".".join(segments)


def sort_key(segments: Segments) -> tuple[bytes, ...]:
    """Return the key that every rank sorts by: bytes, whatever the locale or Python's string order."""
    return tuple(segment.encode("utf-8", "surrogatepass") for segment in segments)


def file_name(text: str) -> str:
    """Return ``text`` as a file name: percent-encoded where it is none, cut with a checksum where it is too long.

    Different texts give different names, over-long ones by 128 bits of BLAKE2. No name is ``.`` or ``..``, hidden, or
    that of the manifest.
    """
    raw = text.encode("utf-8", "surrogatepass")
    encoded = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in raw)
    if encoded.startswith("."):
        encoded = "%2E" + encoded[1:]
    if encoded == MANIFEST_NAME:
        encoded = encoded.replace(".", "%2E")
    if len(encoded) > _LONGEST:
        mark = f"%~{hashlib.blake2b(raw, digest_size=16).hexdigest()}"  # no encoded text has a "~"
        encoded = encoded[: _LONGEST - len(mark)] + mark
    return encoded or "%"


def shard_name(index: int, count: int, *, part: int = 1, extra: bool = False) -> str:
    """Return the name of a tensor file in a folder, as transformers names them.

    Args:
        index: Number of the file, from 0; with several ranks the rank that writes it.
        count: Of files; with several ranks the number of ranks.
        part: 2, 3, … for further files of one rank.
        extra: Whether it holds what a rank has of undeclared tensors.
    """
    more = "" if part == 1 else f".{part}"
    return f"model-{index + 1:05d}-of-{count:05d}{EXTRA if extra else ''}{more}.safetensors"


def step_name(step: int) -> str:
    """Return the directory name of a committed checkpoint."""
    return f"step-{step}"


def attempt_name(step: int, save_id: str, attempt: int) -> str:
    """Return the directory name of an attempt; a name is never used twice, because the save id is not."""
    return f".step-{step}.{save_id}.{attempt}"


def old_name(step: int, save_id: str) -> str:
    """Return the name under which a replaced checkpoint waits for its successor's commit."""
    return f".old.step-{step}.{save_id}"


def bad_name(step: int, save_id: str) -> str:
    """Return the name of a checkpoint that a restore found bad; ``save_id`` is its own."""
    return f".bad-step-{step}.{save_id}"


def trash_name(unique: str) -> str:
    """Return the name of something on its way out; ``unique`` is made by the caller."""
    return f".trash.{unique}"


def term_name(term: int) -> str:
    """Return the name of the file that claims a term."""
    return f".term-{term}"


def meet_name(unique: str) -> str:
    """Return the name of the empty file by which ranks see that they share the directory; ``unique`` has 32 digits."""
    return f".meet-{unique}"


class Attempt(NamedTuple):
    """The parts of an attempt's or a replaced checkpoint's name."""

    step: int
    save_id: str
    attempt: int


# One spelling for each number, so that two names are never one step: no zeros in front.
_NUMBER = r"(0|[1-9]\d{0,18})"
_ID = r"([0-9a-f-]{1,64})"
_STEP = re.compile(rf"step-{_NUMBER}", re.ASCII)
_TERM = re.compile(rf"\.term-{_NUMBER}", re.ASCII)
_ATTEMPT = re.compile(rf"\.step-{_NUMBER}\.{_ID}\.(0|[1-9]\d{{0,8}})", re.ASCII)
_OLD = re.compile(rf"\.old\.step-{_NUMBER}\.{_ID}", re.ASCII)
_BAD = re.compile(rf"\.bad-step-{_NUMBER}\.{_ID}", re.ASCII)
_MEET = re.compile(r"\.meet-([0-9a-f]{32})", re.ASCII)


def _match(pattern: re.Pattern[str], name: str) -> re.Match[str] | None:
    """Return the match of a whole name whose number, its first group, is one that we give out."""
    match = pattern.fullmatch(name)
    return match if match and int(match[1]) <= MAX_STEP else None


def parse_step(name: str) -> int | None:
    """Return the step of a committed checkpoint's directory name, else None."""
    match = _match(_STEP, name)
    return int(match[1]) if match else None


def parse_term(name: str) -> int | None:
    """Return the term that a file name claims, else None."""
    match = _match(_TERM, name)
    return int(match[1]) if match else None


def parse_attempt(name: str) -> Attempt | None:
    """Return the parts of an attempt's directory name, else None."""
    match = _match(_ATTEMPT, name)
    return Attempt(int(match[1]), match[2], int(match[3])) if match else None


def parse_old(name: str) -> Attempt | None:
    """Return step and id of a replaced checkpoint's directory name, else None."""
    match = _match(_OLD, name)
    return Attempt(int(match[1]), match[2], 0) if match else None


def parse_bad(name: str) -> Attempt | None:
    """Return step and id of a bad checkpoint's directory name, else None."""
    match = _match(_BAD, name)
    return Attempt(int(match[1]), match[2], 0) if match else None


def parse_meet(name: str) -> str | None:
    """Return what makes the name of a file to meet at unique, else None."""
    match = _MEET.fullmatch(name)
    return match[1] if match else None
