"""The manifest: the record whose publication is the commit.

``manifest.json`` begins with ``{"head":{…},"head_sum":"…"`` within its first 512 bytes, so that a scan of a run reads
no more, and ends with ``,"sum":"…"}``: xxh3-64 of the head's JSON, xxh3-128 of all bytes before the last key. It holds
per file the size, the start of the data section and the xxh3-128 of the header; block checksums are in headers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import xxhash

from aiockpt.errors import CheckpointCorruptError, ConfigError
from aiockpt.format.dtypes import nbytes_of
from aiockpt.format.image import ALIGN
from aiockpt.format.names import MAX_STEP
from aiockpt.format.placings import MAX_RANKS, PlacingRecord, ShardingRecord, check_placing
from aiockpt.format.tree import Node, check_tree

__all__ = [
    "FORMAT_VERSION",
    "HEAD_NBYTES",
    "FileRecord",
    "Head",
    "Manifest",
    "Plan",
    "decode_manifest",
    "encode_manifest",
    "encode_own",
    "parse_head",
]

FORMAT_VERSION = 1
HEAD_NBYTES = 512
_OPENING = '{"head":'
_HEAD_SUM = ',"head_sum":"'
_CLOSING = b',"sum":"%b"}'
_CLOSING_NBYTES = len(_CLOSING % (b"0" * 32))


_Number = Annotated[int, msgspec.Meta(ge=0, le=MAX_STEP)]


class Head(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What tells checkpoints of a run apart. Newest is the highest (term, ordinal), not the highest step."""

    format: Annotated[int, msgspec.Meta(ge=1)] = FORMAT_VERSION
    step: _Number
    term: _Number
    ordinal: _Number
    save_id: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f-]{1,64}\Z")]
    """Becomes part of directory names, hence so few characters."""
    world_size: _Number
    nbytes: _Number
    """Bytes of all tensor files."""
    created: str
    """UTC, ISO 8601; for people, nothing is decided by it."""
    package: str
    """Version of aiockpt that wrote it."""


class FileRecord(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """One file of the checkpoint."""

    path: str
    """Relative to the manifest, ``/`` between folder and name."""
    nbytes: _Number
    data_start: _Number
    """A multiple of 4096; 0 for a plain file, whose ``sum`` is then that of its whole content."""
    sum: str
    """xxh3-128 of the header as it lies on disk, 32 hexadecimal digits."""
    rank: _Number = 0
    """Who wrote it."""


class Plan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The part that is known before staging: columns over the entries, and the tree of the state.

    With one rank there are no placings: each entry stands whole in its file.
    """

    classes: list[tuple[str, list[int], str]]
    """Distinct (dtype in the file, shape in the file, mark). Mark ``C128``: complex128 as F64 with a trailing 2. The
    shape is that of the whole tensor."""
    names: list[str]
    """Per entry: its name in its file."""
    entry_classes: list[int]
    entry_files: list[int]
    """Per entry: index into ``Manifest.files``. Of one that is cut, the file of the first part."""
    tree: Node
    """See ``format.tree``."""
    placings: list[PlacingRecord] = []
    """Distinct ones."""
    entry_placings: list[int] = []
    entry_replicas: list[int] = []
    """Per entry: which of the ranks that hold the same part wrote it, see ``planning.sharding.Sharding.owners``."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A decoded ``manifest.json``."""

    head: Head
    metadata: Any
    """The user's, as ``format.values`` encodes it."""
    files: list[FileRecord]
    values: list[Any]
    """Encoded values, by their numbers in the tree."""
    plan: Plan
    own_plans: list[Plan] = []
    """Distinct plans of what ranks have for themselves; the tree is an object with a node for each place
    ``["own", key]``. Files are counted among the tensor files of the rank."""
    own_plan_of: list[int] = []
    """By rank; -1 where it has nothing for itself. Empty where no rank has."""
    rank_values: list[list[Any]] = []
    """By rank: the encoded values of its own plan."""


_decoder = msgspec.json.Decoder(Manifest)


def encode_manifest(
    head: Head, files: list[FileRecord], *, values: bytes, metadata: bytes, plan: bytes, own: bytes = b""
) -> bytes:
    """Return the bytes of ``manifest.json``; ``values``, ``metadata`` and ``plan`` are JSON already.

    Args:
        head: As it will be found again.
        files: In the order that the plan counts them in.
        values: See ``Manifest``.
        metadata: See ``Manifest``.
        plan: See ``Plan``.
        own: What ``encode_own`` made, where ranks have something for themselves.

    Raises:
        ValueError: No reader would take the head; better said before the commit than after it.
    """
    fields = msgspec.to_builtins(head)
    msgspec.convert(fields, Head)
    text = json.dumps(fields, separators=(",", ":"))
    opening = f"{_OPENING}{text}{_head_sum(text)}".encode()
    if len(opening) > HEAD_NBYTES:
        raise ValueError(f"the head of a manifest has {len(opening)} bytes, readers look at {HEAD_NBYTES}")
    parts = {b"files": msgspec.json.encode(files), b"metadata": metadata, b"values": values, b"plan": plan}
    body = b"".join((opening, *(b',"%b":%b' % part for part in parts.items()), own))
    return body + _CLOSING % xxhash.xxh3_128_hexdigest(body).encode()


def encode_own(plans: Sequence[bytes], values: Sequence[bytes]) -> bytes:
    """Return what ranks have for themselves, for ``encode_manifest``.

    Args:
        plans: By rank: JSON of a ``Plan``, or nothing.
        values: By rank: JSON array of its own values, or nothing.
    """
    if not any(plans):
        return b""
    distinct = {plan: number for number, plan in enumerate(dict.fromkeys(filter(None, plans)))}
    numbers = msgspec.json.encode([distinct.get(plan, -1) for plan in plans])
    lists = b",".join(own or b"[]" for own in values)
    return b',"own_plans":[%b],"own_plan_of":%b,"rank_values":[%b]' % (b",".join(distinct), numbers, lists)


def parse_head(data: bytes, *, file: str) -> Head:
    """Read the head from the first ``HEAD_NBYTES`` bytes of a manifest (or all of it).

    Raises:
        CheckpointCorruptError: There is none.
        ConfigError: The format is newer than this package.
    """
    text = data[:HEAD_NBYTES].decode("utf-8", "replace")
    try:
        if not text.startswith(_OPENING):
            raise ValueError(f"it does not begin with {_OPENING}")
        raw, end = json.JSONDecoder().raw_decode(text, len(_OPENING))
        expected = _head_sum(text[len(_OPENING) : end])
        found = text[end : end + len(expected)]
        # The sum first: a flipped bit in the version is no newer format. Every format to come keeps head and sum.
        if found == expected or not found.startswith(_HEAD_SUM):
            _check_version(raw.get("format") if isinstance(raw, dict) else None, file)
        if found != expected:
            raise ValueError(f"behind its head stands {found!r}, it needs {expected!r}")
        return msgspec.convert(raw, Head)
    except ConfigError:  # a ValueError too
        raise
    except (ValueError, RecursionError) as exc:
        raise _corrupt(file, str(exc)) from exc


def decode_manifest(data: bytes, *, file: str) -> Manifest:
    """Read a manifest and check that its columns, files and tree fit each other.

    Raises:
        CheckpointCorruptError: Something does not fit; says what.
        ConfigError: The format is newer than this package.
    """
    head = parse_head(data, file=file)
    _check_sum(data, file)
    try:
        manifest = _decoder.decode(data)
        if manifest.head != head:
            raise ValueError("it has two heads")
        _check_columns(manifest.plan, len(manifest.files))
        _check_placings(manifest.plan, head.world_size)
        _check_files(manifest.files, head.world_size)
        check_tree(manifest.plan.tree, entries=len(manifest.plan.names), values=len(manifest.values))
        _check_own(manifest)
    except (ValueError, RecursionError) as exc:  # msgspec's and Unicode's errors are ValueErrors
        raise _corrupt(file, str(exc)) from exc
    return manifest


def _head_sum(text: str) -> str:
    return f'{_HEAD_SUM}{xxhash.xxh3_64_hexdigest(text.encode())}"'


def _check_sum(data: bytes, file: str) -> None:
    body, closing = data[:-_CLOSING_NBYTES], data[-_CLOSING_NBYTES:]
    digest = xxhash.xxh3_128_hexdigest(body)
    if closing == _CLOSING % digest.encode():
        return
    raise CheckpointCorruptError(
        f"{file} is no usable manifest",
        why=f"its checksum over {len(body)} bytes is {digest}, and it ends with {closing!r}",
        next="restore another step",
        file=file,
        offset=0,
        expected=closing.decode("utf-8", "replace").removeprefix(',"sum":"').removesuffix('"}'),
        found=digest,
    )


def _check_version(version: object, file: str) -> None:
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ConfigError(
            f"{file} has format {version}, this aiockpt reads up to {FORMAT_VERSION}",
            why="it was written by a newer aiockpt",
            next="upgrade aiockpt",
            path=file,
        )


def _check_columns(plan: Plan, files: int) -> None:
    entries = len(plan.names)
    if len(plan.entry_classes) != entries or len(plan.entry_files) != entries:
        raise ValueError("its columns have different lengths")
    for column, limit, what in ((plan.entry_classes, len(plan.classes), "class"), (plan.entry_files, files, "file")):
        if column and not (min(column) >= 0 and max(column) < limit):
            raise ValueError(f"an entry names a {what} that is not there")
    for dtype, shape, _ in plan.classes:
        nbytes_of(dtype, shape)


def _check_placings(plan: Plan, world: int) -> None:
    for record in plan.placings:
        check_placing(record, world=world)
    if not plan.placings and not plan.entry_placings and not plan.entry_replicas:
        return
    entries = len(plan.names)
    if len(plan.entry_placings) != entries or len(plan.entry_replicas) != entries:
        raise ValueError("its columns have different lengths")
    used = set(zip(plan.entry_placings, plan.entry_classes, plan.entry_replicas, strict=True))
    for placing, kind, replica in used:
        if not 0 <= placing < len(plan.placings):
            raise ValueError("an entry names a placing that is not there")
        record = plan.placings[placing]
        if not isinstance(record, ShardingRecord):
            continue
        shape = plan.classes[kind][1]
        if not 0 <= replica < record.replicas or any(dim >= len(shape) for _, dim, _ in record.cuts):
            raise ValueError(f"an entry of shape {shape} is not cut as it says")


def _check_own(manifest: Manifest) -> None:
    ranks = len(manifest.own_plan_of)
    if not ranks and not manifest.own_plans and not manifest.rank_values:
        return
    if ranks != len(manifest.rank_values) or ranks != manifest.head.world_size or ranks > MAX_RANKS:
        raise ValueError(f"{ranks} of {manifest.head.world_size} ranks have something for themselves")
    if len(manifest.plan.entry_placings) != len(manifest.plan.names):
        raise ValueError("ranks have something for themselves, and nothing says where the rest is")
    tensor_files = Counter(record.rank for record in manifest.files if record.data_start)
    checked = set()
    for rank, number in enumerate(manifest.own_plan_of):
        if number == -1:
            continue
        if not 0 <= number < len(manifest.own_plans):
            raise ValueError(f"rank {rank} has a plan of its own that is not there")
        case = number, len(manifest.rank_values[rank]), tensor_files[rank]
        if case not in checked:
            checked.add(case)
            _check_own_plan(manifest.own_plans[number], values=case[1], files=case[2])


def _check_own_plan(plan: Plan, *, values: int, files: int) -> None:
    _check_columns(plan, files)
    if plan.placings or plan.entry_placings or plan.entry_replicas or not isinstance(plan.tree, dict):
        raise ValueError("what a rank has for itself is cut over others")
    check_tree(plan.tree, entries=len(plan.names), values=values, is_own=True)


def _check_files(files: list[FileRecord], world: int) -> None:
    for record in files:
        if any(part in ("", ".", "..") for part in record.path.split("/")) or "\0" in record.path:
            raise ValueError(f"the file name {record.path!r:.200} leads out of the checkpoint")
        if record.rank and record.rank >= world:
            raise ValueError(f"{record.path!r:.200} is of rank {record.rank}, the job had {world}")
        if record.data_start > record.nbytes or record.data_start % ALIGN:
            raise ValueError(f"the sizes of {record.path!r:.200} do not fit")
    if len({record.path for record in files}) < len(files):
        raise ValueError("a file stands in it twice")


def _corrupt(file: str, why: str) -> CheckpointCorruptError:
    return CheckpointCorruptError(f"{file} is no usable manifest", why=why, next="restore another step", file=file)
