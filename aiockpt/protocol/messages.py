"""What trainer and worker say to each other, as types; every new field needs a default.

Messages never carry tensors: those lie in the arena, and a message names byte ranges of it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

__all__ = [
    "MAGIC",
    "PROTOCOL_VERSION",
    "Adopt",
    "Beat",
    "BeginSave",
    "Cancel",
    "Close",
    "Closed",
    "Committed",
    "EndStaging",
    "Failed",
    "FileImage",
    "Hello",
    "Message",
    "Progress",
    "Ready",
    "Reserve",
    "Reserved",
    "Setup",
    "SlotFree",
    "Staged",
    "WireError",
]

MAGIC = "aiockpt"
PROTOCOL_VERSION = 1

Count = Annotated[int, msgspec.Meta(ge=0)]
"""A number, offset or size; a negative one is refused when it is decoded, before it can index anything."""
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class _Message(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag_field="is"):
    pass


class WireError(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An error as data; the coordinator makes the exception from ``kind``."""

    kind: Literal[
        "storage",
        "memory",
        "fenced",
        "exists",
        "cancelled",
        "config",
        "unknown_commit",
        "internal",
        "peer",
        "mismatch",
        "timeout",
    ]
    what: str
    why: str = ""
    next: str = ""
    errno: int | None = None
    path: str | None = None
    traceback: str = ""
    """Of an internal error, for the log."""
    rank: int | None = None
    """On which rank it was met, where there are several; None where no single one is to blame."""
    phase: str = ""
    """What that rank was doing."""
    keys: list[str] = []
    """Of a mismatch: the dotted names that it is about."""
    ranks: list[int] = []
    """Of a mismatch: the ranks that differ."""


class Setup(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the trainer tells its worker once, in its Hello."""

    run: str
    """Absolute path of the run directory, which the trainer has taken."""
    term: Count
    """The term that the trainer claimed; a higher one in the directory fences this worker."""
    linger_timeout: Seconds | None
    """Seconds to finish a staged save after the trainer's death; None is no limit."""
    beat_interval: Seconds
    """Seconds between two beats."""


class Hello(_Message, tag="hello", frozen=True, kw_only=True, gc=False):
    """First frame each way; both ends compare ``magic``, ``protocol``, ``package`` and ``path``."""

    magic: str
    protocol: int
    package: str
    """``aiockpt.__version__``."""
    path: str
    """Directory that the package was imported from."""
    setup: Setup | None = None
    """Trainer to worker only."""


# ---- trainer to worker


class Reserve(_Message, tag="reserve", frozen=True, kw_only=True, gc=False):
    """Make an arena; the worker drops the one it has. Only sent while no save is open."""

    nbytes: Count
    capacity: Count | None = None


class Adopt(_Message, tag="adopt", frozen=True, kw_only=True, gc=False):
    """The arena of a worker that died; carries one descriptor."""

    nbytes: Count
    fds: Count = 1


class FileImage(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One file of a checkpoint as it lies in the arena, padded there to a multiple of 4096 bytes."""

    path: str
    """Relative to the checkpoint's directory, ``/`` between folder and name, file-name safe."""
    offset: Count
    """Byte offset in the arena, a multiple of 4096."""
    nbytes: Count
    """Exact size of the file, header included."""
    data_start: Count
    """Where the header ends and the data section begins, a multiple of 4096; 0 for a plain file without checksums."""
    sums_at: Count
    """Where in the header the fixed-width block checksums stand; 0 for a plain file."""


class BeginSave(_Message, tag="begin", frozen=True, kw_only=True, gc=False):
    """Open an attempt. The trainer sends no second one before SlotFree of the first."""

    save_id: str
    step: Count
    attempt: Count
    """0 for the first try, +1 for each retry after a worker's death."""
    ordinal: Count
    overwrite: bool
    """Replace ``step-N`` where it stands (an explicit overwrite, or a step of an abandoned branch)."""
    files: list[FileImage]
    plan_offset: Count
    """Arena range of the plan, JSON: the part of the manifest that is known before staging."""
    plan_nbytes: Count
    prune: list[str] = []
    """Directory names in the run that retention removes once this save is committed."""


class Staged(_Message, tag="staged", frozen=True, kw_only=True, gc=False):
    """The first ``upto`` bytes of the file's image are final (the checksums in its header aside)."""

    save_id: str
    file: Count
    """Index into ``BeginSave.files``."""
    upto: Count


class EndStaging(_Message, tag="end", frozen=True, kw_only=True, gc=False):
    """Everything is staged and checked; from here the save survives the trainer."""

    save_id: str
    values: bytes
    """JSON array of the encoded values, see ``format.values``."""
    metadata: bytes
    """JSON of the user's encoded metadata."""


class Cancel(_Message, tag="cancel", frozen=True, kw_only=True, gc=False):
    """Give the save up if it is not COMMITTING yet."""

    save_id: str


class Close(_Message, tag="close", frozen=True, kw_only=True, gc=False):
    """Finish what is staged, then end."""


# ---- worker to trainer


class Ready(_Message, tag="ready", frozen=True, kw_only=True, gc=False):
    """The worker is up and can write into the run directory; or ``error`` says why not, and it ends."""

    pid: Count
    error: WireError | None = None


class Reserved(_Message, tag="reserved", frozen=True, kw_only=True, gc=False):
    """The answer to Reserve: one descriptor, or an error and none."""

    nbytes: Count
    fds: Count = 0
    error: WireError | None = None


class Progress(_Message, tag="progress", frozen=True, kw_only=True, gc=False):
    """Bytes of the save written so far; sent at each change of state, else at most every beat interval."""

    save_id: str
    written: Count
    state: str = "staging"
    """A ``lifecycle.SaveState`` value as the worker sees it."""


class Committed(_Message, tag="committed", frozen=True, kw_only=True, gc=False):
    """The checkpoint is durable and visible."""

    save_id: str
    path: str
    """Absolute path of ``step-N``."""
    nbytes: Count
    timings: dict[str, float]
    """Seconds: ``write``, ``sync``, ``commit``; and flags such as ``buffered`` (1.0 where direct I/O was refused)."""
    pruned: list[str] = []


class Failed(_Message, tag="failed", frozen=True, kw_only=True, gc=False):
    """The save ended without a checkpoint; its attempt is removed."""

    save_id: str
    error: WireError


class SlotFree(_Message, tag="free", frozen=True, kw_only=True, gc=False):
    """No thread of the worker reads the arena any more."""

    save_id: str


class Beat(_Message, tag="beat", frozen=True, kw_only=True, gc=False):
    """The worker's loop lives."""

    moved: Count
    """Counts every finished write, sync, rename and unlink; standing still while ``busy`` means a hanging disk."""
    busy: str = ""
    """The file operation under way that began first, or empty."""


class Closed(_Message, tag="closed", frozen=True, kw_only=True, gc=False):
    """Last frame before the worker ends."""


Message = (
    Hello
    | Reserve
    | Adopt
    | BeginSave
    | Staged
    | EndStaging
    | Cancel
    | Close
    | Ready
    | Reserved
    | Progress
    | Committed
    | Failed
    | SlotFree
    | Beat
    | Closed
)
