"""What trainer and worker say to each other, as types; every new field needs a default.

Messages never carry tensors: those lie in the arena, and a message names byte ranges of it.
"""

from __future__ import annotations

import msgspec

from aiockpt.protocol.star import EndedCall, OpenCall, StarMessage, Verdict, WhenBusy
from aiockpt.protocol.terms import Count, Seconds, WireError

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
    "Enlist",
    "Enlisted",
    "Failed",
    "FileImage",
    "FromHub",
    "Hello",
    "Message",
    "NoHub",
    "Opened",
    "Progress",
    "RankCall",
    "Ready",
    "Reserve",
    "Reserved",
    "Setup",
    "SlotFree",
    "Staged",
    "ToHub",
    "TrainerBeat",
]

MAGIC = "aiockpt"
PROTOCOL_VERSION = 1


class _Message(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag_field="is"):
    pass


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
    rank: Count = 0
    """Above 0 the run is taken by another trainer: it is opened with ``Enlist``, and never swept or published to."""


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


class RankCall(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a save has beside, where there are several ranks; see ``star``."""

    n: Count
    """Call number, the same on all ranks."""
    overwrite: bool
    """As the user said; what stands on an abandoned branch aside."""
    when_busy: WhenBusy
    timeout: Seconds | None
    digest: str
    """Of the plan."""
    extra_files: list[Count] = []
    """Indices of the files of undeclared tensors."""
    extra_keys: list[str] = []
    """Of each of them the key of the state that its tensors stand under; empty for those at the very top."""
    own: bytes = b""
    """What this rank has for itself: JSON of a ``format.manifest.Plan``."""
    opened: OpenCall | None = None
    """What an earlier worker heard of it."""


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
    call: RankCall | None = None
    """With several ranks; then ``save_id`` and ``attempt`` are words between trainer and worker alone, those in names
    of directories are the hub's."""


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
    own_values: bytes = b"[]"
    """JSON array of the encoded values that this rank has for itself."""
    probes: dict[str, dict[str, str]] = {}
    """See ``star.Details``."""


class Cancel(_Message, tag="cancel", frozen=True, kw_only=True, gc=False):
    """Give the save up if it is not COMMITTING yet."""

    save_id: str
    error: WireError | None = None
    """With several ranks: what the others are told."""
    is_unheard: bool = False
    """With several ranks: no worker of this rank has ever been in, so no hub knows of the save."""


class Enlist(_Message, tag="enlist", frozen=True, kw_only=True, gc=False):
    """Take part in the star of a job; sent to each worker, and again where another hub is to be asked.

    Carries one descriptor on rank 0: the listener, which the trainer keeps.
    """

    rank: Count
    world: Count
    member: str
    """Of this trainer, see ``star.Join``."""
    host: str
    port: Count
    token: bytes
    is_first: bool
    """Whether this is the first worker of rank 0."""
    stall_timeout: Seconds | None
    arrival_timeout: Seconds | None
    return_timeout: Seconds | None
    ended_calls: list[EndedCall] = []
    slot_of: Count | None = None
    fds: Count = 0


class ToHub(_Message, tag="to_hub", frozen=True, kw_only=True, gc=False):
    """To be said on the star; dropped where this rank is not in."""

    message: StarMessage


class TrainerBeat(_Message, tag="trainer_beat", frozen=True, kw_only=True, gc=False):
    """The trainer's process runs, also where its program computes for long; sent where there are several ranks."""


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


class Enlisted(_Message, tag="enlisted", frozen=True, kw_only=True, gc=False):
    """This rank is in: what it had said to the hub by ``ToHub`` and got no answer to is to be said again."""


class NoHub(_Message, tag="no_hub", frozen=True, kw_only=True, gc=False):
    """The run directory is not the others', the hub does not take this rank, or none was there for too long.

    Of these only the last may mend itself; then ``Enlisted`` follows.
    """

    error: WireError


class FromHub(_Message, tag="from_hub", frozen=True, kw_only=True, gc=False):
    """The hub said something that is for the trainer."""

    message: StarMessage


class Opened(_Message, tag="opened", frozen=True, kw_only=True, gc=False):
    """The hub's decision on a save; with ``take`` under which id and attempt it is written."""

    save_id: str
    verdict: Verdict
    opened: OpenCall | None = None


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
    | Enlist
    | ToHub
    | TrainerBeat
    | Close
    | Ready
    | Reserved
    | Progress
    | Committed
    | Failed
    | SlotFree
    | Beat
    | Enlisted
    | NoHub
    | FromHub
    | Opened
    | Closed
)
