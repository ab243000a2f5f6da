"""What the workers of a job say to each other, as types; every new field needs a default.

Rank 0's worker is the hub, and a member of its own hub like the others. A save is its call number ``n`` on this wire:
how many times ``save`` was called before it on each rank. The number outlives workers; the id in names of directories
comes with the hub's ``Open``.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from aiockpt.format.manifest import FileRecord
from aiockpt.protocol.terms import Count, Seconds, WireError

__all__ = [
    "Agreed",
    "AgreedStep",
    "Answer",
    "Arguments",
    "Arrive",
    "AskSave",
    "Attend",
    "Body",
    "Committing",
    "Credit",
    "Details",
    "Dropped",
    "End",
    "Ended",
    "EndedCall",
    "Fits",
    "GiveUp",
    "HowFar",
    "Join",
    "Leave",
    "MemberBeat",
    "Met",
    "Open",
    "OpenCall",
    "Pace",
    "Propose",
    "Recall",
    "Refused",
    "Silent",
    "StarMessage",
    "Verdict",
    "WantBody",
    "WantDetails",
    "Welcome",
    "Written",
]

Verdict = Literal["take", "skip", "busy"]
End = Literal["committed", "failed", "skip", "busy"]
WhenBusy = Literal["wait", "skip", "raise"]


class _StarMessage(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag_field="is"):
    pass


# ---- member to hub


class OpenCall(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A save that was opened by an earlier hub, and whose end this member does not know."""

    n: Count
    save_id: str
    attempt: Count


class EndedCall(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A save whose end this member knows."""

    n: Count
    end: End


class Join(_StarMessage, tag="join", frozen=True, kw_only=True, gc=False):
    """First message on a connection, behind the proof that the member knows the token.

    The member waits for ``Welcome`` before it says more: until then the hub takes frames of 4 KiB at most.
    """

    rank: Count
    world: Count
    package: str
    member: str = ""
    """Of the trainer, the same for all of its workers: a worker of another job is known by it."""
    open_call: OpenCall | None = None
    ended_calls: list[EndedCall] = []
    """The last ones, at most 64: other ranks may not have heard of them yet."""
    slot_of: Count | None = None
    """The save that has this rank's slot."""
    why: str = ""
    """Of a rank that comes to say that it leaves: the reason, also of the saves that it has ended."""


class Arguments(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What all ranks must say alike in one call of ``save``."""

    step: Count
    overwrite: bool = False
    when_busy: WhenBusy = "wait"
    timeout: Seconds | None = None


class Arrive(_StarMessage, tag="arrive", frozen=True, kw_only=True, gc=False):
    """This rank's trainer has called ``save``."""

    n: Count
    arguments: Arguments
    digest: str = ""
    """Of the rank's plan; empty where it was ``refused``."""
    refused: WireError | None = None
    """Why ``save`` raised on this rank: the call counts, and fails everywhere."""
    is_busy: bool = False
    """This rank had no free slot, and has skipped it. The save that has the slot may not have been told yet."""


class Body(_StarMessage, tag="body", frozen=True, kw_only=True, gc=False):
    """The answer to WantBody."""

    digest: str
    body: bytes


class Written(_StarMessage, tag="written", frozen=True, kw_only=True, gc=False):
    """All files of this rank are durable, and its snapshot was checked."""

    n: Count
    attempt: Count
    files: list[FileRecord]
    values_sum: str = ""
    """xxh3-128 of the values that must be equal on all ranks."""
    tensors_sum: str = ""
    """Likewise of the undeclared tensors."""
    probes: dict[str, str] = {}
    """By group of ranks that hold the same: xxh3-64 of samples of what is declared to be replicated."""
    own: bytes = b""
    """What is this rank's own: JSON of a ``format.manifest.Plan``; empty where that is nothing."""
    rank_values: bytes = b"[]"
    """JSON array of the values that are this rank's own."""


class Details(_StarMessage, tag="details", frozen=True, kw_only=True, gc=False):
    """The answer to WantDetails: what a rank has said sums of."""

    n: Count
    values: bytes
    """JSON array of the values that must be equal on all ranks."""
    metadata: bytes = b"null"
    """JSON of the user's encoded metadata."""
    sums: dict[str, str] = {}
    """By dotted name: xxh3-64 of an undeclared tensor."""
    probes: dict[str, dict[str, str]] = {}
    """By group, then by dotted name."""


class GiveUp(_StarMessage, tag="give_up", frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """The save cannot be on this rank, or its user cancels it: it ends on all ranks, unless it is COMMITTING."""

    n: Count
    error: WireError
    """With its phase; the hub adds the rank."""
    attempt: Count | None = None
    """Which one failed; where another is under way by now that says nothing, as the old one was moved away from under
    its writers. None is the save as a whole."""


class Credit(_StarMessage, tag="credit", frozen=True, kw_only=True, gc=False):
    """This rank's trainer has seen its slot free again after save ``n``."""

    n: Count


class MemberBeat(_StarMessage, tag="beat", frozen=True, kw_only=True, gc=False):
    """The member's loop lives; each way."""


class Leave(_StarMessage, tag="leave", frozen=True, kw_only=True, gc=False):
    """This rank takes part in no further save, and no worker of it comes back."""

    why: str


class Silent(_StarMessage, tag="silent", frozen=True, kw_only=True, gc=False):
    """This rank's trainer has not been heard for too long, though its worker lives; said again behind a ``Welcome``."""

    error: WireError | None = None
    """What the other ranks are told where they would wait for it; None: it is heard again."""


class AskSave(_StarMessage, tag="ask_save", frozen=True, kw_only=True, gc=False):
    """This rank wants a save at a step that suits all."""

    reason: str


class AgreedStep(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """At the first step from this one on for which a rank asks whether a save is due, one is."""

    step: Count
    reasons: list[str]


class Pace(_StarMessage, tag="pace", frozen=True, kw_only=True, gc=False):
    """The answer to HowFar."""

    round: Count
    step: int
    """The last one that this rank has gone past; below zero: none yet."""
    lead: Count = 0
    """How many steps it does in a second."""
    asks: str = ""
    """Why it wants a save, where none that was agreed on since serves for that."""
    agreed: AgreedStep | None = None
    """The last one it heard of."""


class Answer(_StarMessage, tag="answer", frozen=True, kw_only=True, gc=False):
    """Whether this rank has not gone past the proposed step; if so it stops there until it hears more."""

    round: Count
    accepts: bool


class Attend(_StarMessage, tag="attend", frozen=True, kw_only=True, gc=False):
    """This rank has come to a meeting: it waits there until all have. Said again after a loss, or with an error."""

    meeting: str
    """The same on all ranks, and never used twice in a job."""
    claim: str
    """What must be the same on all ranks, for people."""
    word: bytes = b""
    """Rank 0's is what all are told."""
    error: WireError | None = None
    """Why this rank does not go on: the meeting ends with it on all ranks. The hub adds the rank."""


class Met(_StarMessage, tag="met", frozen=True, kw_only=True, gc=False):
    """How a meeting ended: all ranks have come where there is no ``error``."""

    meeting: str
    word: bytes = b""
    error: WireError | None = None
    """With the rank that had it, or is to blame, where there is one."""


class Recall(_StarMessage, tag="recall", frozen=True, kw_only=True, gc=False):
    """How the last meetings ended, as this rank was told; said behind every ``Welcome``, before all about meetings.

    Other ranks may not have heard of them, and this hub neither.
    """

    mets: list[Met]


# ---- hub to member


class Welcome(_StarMessage, tag="welcome", frozen=True, kw_only=True, gc=False):
    """The member is in."""

    epoch: Count
    """How many joins this hub has seen."""


class Refused(_StarMessage, tag="refused", frozen=True, kw_only=True, gc=False):
    """The member is not in, or no longer, and must not come again: it does not fit, or its next worker is there."""

    error: WireError


class Open(_StarMessage, tag="open", frozen=True, kw_only=True, gc=False):
    """The decision; with ``take`` the directories of this attempt stand."""

    n: Count
    verdict: Verdict
    save_id: str = ""
    attempt: Count = 0


class WantBody(_StarMessage, tag="want_body", frozen=True, kw_only=True, gc=False):
    """No plan with this digest is known yet."""

    digest: str


class Fits(_StarMessage, tag="fits", frozen=True, kw_only=True, gc=False):
    """The plans of all ranks fit each other."""

    n: Count
    extra: list[str] = []
    """Folders in which this rank is the one that writes its undeclared tensors: no lower rank has them all."""


class WantDetails(_StarMessage, tag="want_details", frozen=True, kw_only=True, gc=False):
    """All have written; this rank is to say what its sums are of."""

    n: Count


class Committing(_StarMessage, tag="committing", frozen=True, kw_only=True, gc=False):
    """All is written and the plans fit: too late for a cancel."""

    n: Count


class Ended(_StarMessage, tag="ended", frozen=True, kw_only=True, gc=False):
    """The outcome: committed where there is no ``error``."""

    n: Count
    path: str = ""
    nbytes: Count = 0
    timings: dict[str, float] = {}
    pruned: list[str] = []
    """Checkpoints that retention removed."""
    error: WireError | None = None


class HowFar(_StarMessage, tag="how_far", frozen=True, kw_only=True, gc=False):
    """Somebody wants a save; begins a round."""

    round: Count


class Propose(_StarMessage, tag="propose", frozen=True, kw_only=True, gc=False):
    """Would this step do for a save?"""

    round: Count
    step: Count


class Agreed(_StarMessage, tag="agreed", frozen=True, kw_only=True, gc=False):
    """It does for all."""

    agreed: AgreedStep


class Dropped(_StarMessage, tag="dropped", frozen=True, kw_only=True, gc=False):
    """Nothing is proposed any more."""


StarMessage = (
    Join
    | Arrive
    | Body
    | Written
    | Details
    | GiveUp
    | Credit
    | MemberBeat
    | Leave
    | Silent
    | Welcome
    | Refused
    | Open
    | WantBody
    | Fits
    | WantDetails
    | Committing
    | Ended
    | AskSave
    | Pace
    | Answer
    | HowFar
    | Propose
    | Agreed
    | Dropped
    | Attend
    | Met
    | Recall
)
