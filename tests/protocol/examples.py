"""One message of every kind with every field filled, and the barest of those that have optional fields."""

from __future__ import annotations

from typing import Any

from aiockpt import __version__
from aiockpt.protocol.messages import (
    MAGIC,
    PROTOCOL_VERSION,
    Adopt,
    Beat,
    BeginSave,
    Cancel,
    Close,
    Closed,
    Committed,
    EndStaging,
    Enlist,
    Enlisted,
    Failed,
    FileImage,
    FromHub,
    Hello,
    Message,
    NoHub,
    Opened,
    Progress,
    RankCall,
    Ready,
    Reserve,
    Reserved,
    Setup,
    SlotFree,
    Staged,
    ToHub,
    TrainerBeat,
)
from aiockpt.protocol.star import Credit, Dropped, EndedCall, OpenCall
from aiockpt.protocol.terms import WireError
from aiockpt.worker.launch import PACKAGE_PATH


def our_hello(**changes: Any) -> Hello:
    """Return the Hello of this very installation, changed."""
    fields = {"magic": MAGIC, "protocol": PROTOCOL_VERSION, "package": __version__, "path": PACKAGE_PATH}
    return Hello(**(fields | changes))


SAVE_ID = "0b6f1c9e-5d2a-4f7e-9c1b-3a8d7e6f5c4b"
ERROR = WireError(
    kind="storage",
    what="step 1200 was not saved",
    why="No space left on device",
    next="free some space",
    errno=28,
    path="/runs/exp1/.step-1200",
    traceback="Traceback …",
)
IMAGE = FileImage(
    path="model/model-00001-of-00001.safetensors", offset=4096, nbytes=5_000_000_000, data_start=8192, sums_at=60
)

EXAMPLES: dict[str, Message] = {
    "hello": Hello(
        magic="aiockpt",
        protocol=1,
        package="0.1.0",
        path="/site-packages/aiockpt",
        setup=Setup(run="/runs/exp1", term=7, linger_timeout=60.0, beat_interval=0.5, rank=3),
    ),
    "hello-bare": Hello(magic="aiockpt", protocol=1, package="0.1.0", path="/site-packages/aiockpt"),
    "hello-endless": Hello(
        magic="aiockpt",
        protocol=1,
        package="0.1.0",
        path="p",
        setup=Setup(run="/runs/ü", term=0, linger_timeout=None, beat_interval=0.5),
    ),
    "reserve": Reserve(nbytes=2_147_483_648, capacity=4_294_967_296),
    "reserve-bare": Reserve(nbytes=0),
    "adopt": Adopt(nbytes=2_147_483_648),
    "begin": BeginSave(
        save_id=SAVE_ID,
        step=1200,
        attempt=1,
        ordinal=13,
        overwrite=True,
        files=[IMAGE],
        plan_offset=5_000_008_192,
        plan_nbytes=77,
        prune=["step-100", "step-200"],
    ),
    "begin-bare": BeginSave(
        save_id=SAVE_ID, step=0, attempt=0, ordinal=0, overwrite=False, files=[], plan_offset=0, plan_nbytes=2
    ),
    "begin-of-several": BeginSave(
        save_id=SAVE_ID,
        step=1200,
        attempt=0,
        ordinal=13,
        overwrite=False,
        files=[IMAGE],
        plan_offset=5_000_008_192,
        plan_nbytes=77,
        call=RankCall(
            n=12,
            overwrite=False,
            when_busy="skip",
            timeout=30.0,
            digest="00112233445566778899aabbccddeeff",
            extra_files=[0],
            extra_keys=["model"],
            own=b"{}",
            opened=OpenCall(n=12, save_id=SAVE_ID, attempt=2),
        ),
    ),
    "staged": Staged(save_id=SAVE_ID, file=0, upto=16_777_216),
    "end": EndStaging(save_id=SAVE_ID, values=b'[1,{"~tuple":[2]}]', metadata=b"null"),
    "end-of-several": EndStaging(
        save_id=SAVE_ID, values=b"[1]", metadata=b"null", own_values=b"[2]", probes={"4 0a1b": {"model.weight": "0c2d"}}
    ),
    "cancel": Cancel(save_id=SAVE_ID),
    "cancel-of-several": Cancel(save_id=SAVE_ID, error=ERROR),
    "enlist": Enlist(
        rank=0,
        world=4,
        member="member",
        host="10.0.0.1",
        port=40_000,
        token=b"sixteen bytes ok",
        is_first=False,
        stall_timeout=60.0,
        arrival_timeout=600.0,
        return_timeout=60.0,
        ended_calls=[EndedCall(n=11, end="committed")],
        slot_of=12,
        fds=1,
    ),
    "enlist-bare": Enlist(
        rank=3,
        world=4,
        member="m",
        host="::1",
        port=1,
        token=b"t",
        is_first=True,
        stall_timeout=None,
        arrival_timeout=None,
        return_timeout=None,
    ),
    "to_hub": ToHub(message=Credit(n=12)),
    "trainer_beat": TrainerBeat(),
    "close": Close(),
    "ready": Ready(pid=4711),
    "ready-error": Ready(pid=4711, error=WireError(kind="config", what="no")),
    "reserved": Reserved(nbytes=2_147_483_648, fds=1),
    "reserved-error": Reserved(nbytes=0, error=ERROR),
    "progress": Progress(save_id=SAVE_ID, written=33_554_432, state="staged"),
    "progress-bare": Progress(save_id=SAVE_ID, written=0),
    "committed": Committed(
        save_id=SAVE_ID,
        path="/runs/exp1/step-1200",
        nbytes=5_000_000_000,
        timings={"write": 2.25, "buffered": 1.0},
        pruned=["step-100"],
    ),
    "committed-bare": Committed(save_id=SAVE_ID, path="/runs/exp1/step-1200", nbytes=0, timings={}),
    "failed": Failed(save_id=SAVE_ID, error=ERROR),
    "free": SlotFree(save_id=SAVE_ID),
    "beat": Beat(moved=42, busy="fdatasync model/model-00001-of-00001.safetensors"),
    "beat-bare": Beat(moved=0),
    "enlisted": Enlisted(),
    "no_hub": NoHub(error=ERROR),
    "from_hub": FromHub(message=Dropped()),
    "opened": Opened(save_id=SAVE_ID, verdict="take", opened=OpenCall(n=12, save_id=SAVE_ID, attempt=0)),
    "opened-skip": Opened(save_id=SAVE_ID, verdict="skip"),
    "closed": Closed(),
}
