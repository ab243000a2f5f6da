"""The star's messages as bytes: whole, cut, flipped, and from strangers."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiockpt.errors import ProtocolError
from aiockpt.format.manifest import FileRecord
from aiockpt.protocol import proof
from aiockpt.protocol.frames import StarDecoder, encode
from aiockpt.protocol.star import (
    Agreed,
    AgreedStep,
    Answer,
    Arguments,
    Arrive,
    AskSave,
    Attend,
    Body,
    Committing,
    Credit,
    Details,
    Dropped,
    Ended,
    EndedCall,
    Fits,
    GiveUp,
    HowFar,
    Join,
    Leave,
    MemberBeat,
    Met,
    Open,
    OpenCall,
    Pace,
    Propose,
    Recall,
    Refused,
    Silent,
    StarMessage,
    WantBody,
    WantDetails,
    Welcome,
    Written,
)
from aiockpt.protocol.terms import Damage, WireError

ERROR = WireError(kind="storage", what="no space", errno=28, rank=3, phase="write")
CORRUPT = WireError(
    kind="corrupt", what="bad", rank=3, damage=Damage(step=5, file="model/a", offset=4096, expected="00", found="01")
)
SAVE_ID = "0" * 36
EXAMPLES: list[StarMessage] = [
    Join(
        rank=3,
        world=4,
        package="1.2.3",
        open_call=OpenCall(n=7, save_id=SAVE_ID, attempt=1),
        ended_calls=[EndedCall(n=6, end="committed")],
        slot_of=6,
    ),
    Arrive(n=7, arguments=Arguments(step=100, timeout=5.0), digest="0" * 32),
    Arrive(n=7, arguments=Arguments(step=100), refused=ERROR),
    Body(digest="0" * 32, body=b"\0\1"),
    Written(n=7, attempt=1, files=[FileRecord(path="model/a", nbytes=1, data_start=0, sum="0" * 32, rank=3)]),
    Details(n=7, values=b"[1]", metadata=b"2", sums={"model.a": "0" * 16}, probes={"4 0a": {"model.b": "1" * 16}}),
    GiveUp(n=7, error=ERROR),
    Credit(n=6),
    MemberBeat(),
    Leave(why="its trainer died"),
    Silent(error=ERROR),
    Silent(),
    Welcome(epoch=9),
    Refused(error=ERROR),
    Open(n=7, verdict="take", save_id=SAVE_ID, attempt=1),
    WantBody(digest="0" * 32),
    Fits(n=7, extra=["model"]),
    WantDetails(n=7),
    Committing(n=7),
    Ended(n=7, path="step-100", nbytes=1 << 40, timings={"written": 1.5}),
    Ended(n=7, error=ERROR),
    AskSave(reason="SIGTERM"),
    Pace(round=1, step=-1, lead=3, asks="SIGTERM", agreed=AgreedStep(step=9, reasons=["10 minutes"])),
    Answer(round=1, accepts=True),
    HowFar(round=1),
    Propose(round=1, step=12),
    Agreed(agreed=AgreedStep(step=12, reasons=["SIGTERM", "10 minutes"])),
    Dropped(),
    Attend(meeting="restore 1, propose 1", claim="restore(step=5)", word=b"\0\1"),
    Attend(meeting="restore 1, read 1", claim="restore(step=5)", error=CORRUPT),
    Met(meeting="restore 1, propose 1", word=b"\0\1"),
    Met(meeting="restore 1, read 1", error=CORRUPT),
    Recall(mets=[Met(meeting="restore 1, propose 1", word=b"\0\1")]),
]


def test_every_message_comes_back_the_same_however_it_is_cut() -> None:
    decoder = StarDecoder()
    stream = b"".join(map(encode, EXAMPLES))
    found = [message for i in range(len(stream)) for message in decoder.feed(stream[i : i + 1])]
    assert found == EXAMPLES
    assert {type(message) for message in found} == set(StarMessage.__args__)


@given(st.sampled_from(EXAMPLES), st.data())
def test_flipped_bytes_are_a_message_or_an_error(message: StarMessage, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    place = data.draw(st.integers(0, len(frame) - 1))
    frame[place] ^= data.draw(st.integers(1, 255))
    try:
        found = StarDecoder().feed(bytes(frame))
    except ProtocolError:
        return
    assert all(isinstance(each, StarMessage) for each in found)


def test_a_join_with_all_that_it_may_say_fits_its_limit() -> None:
    """What it knows of earlier saves is bounded; a hub takes 4 KiB before it knows who speaks."""
    most = 2**64 - 1
    join = Join(
        rank=most,
        world=most,
        package="2026.12.31.dev1+g" + "0" * 40,
        open_call=OpenCall(n=most, save_id=SAVE_ID, attempt=most),
        ended_calls=[EndedCall(n=most, end="committed")] * 64,
        slot_of=most,
    )
    assert len(encode(join)) <= 4096


def test_a_longer_first_frame_is_refused_by_its_length() -> None:
    decoder = StarDecoder(4096)
    with pytest.raises(ProtocolError):
        decoder.feed((4097).to_bytes(4, "little"))


def test_a_proof_needs_the_token_the_challenge_and_the_role() -> None:
    challenged = proof.challenge(b"n" * proof.NONCE_NBYTES)
    answered = proof.answer(b"token", challenged, b"m" * proof.NONCE_NBYTES)
    confirmed = proof.confirm(b"token", challenged, answered)
    assert proof.is_challenge(challenged)
    assert confirmed is not None
    assert proof.is_confirmed(b"token", answered, confirmed)
    assert proof.confirm(b"other", challenged, answered) is None
    assert proof.confirm(b"token", proof.challenge(b"o" * proof.NONCE_NBYTES), answered) is None
    assert not proof.is_confirmed(b"other", answered, confirmed)
    assert not proof.is_confirmed(b"token", answered, answered[: proof.PROOF_NBYTES])


@given(st.binary(max_size=proof.ANSWER_NBYTES * 2))
def test_a_strangers_answer_proves_nothing(said: bytes) -> None:
    assert proof.confirm(hashlib.sha256(b"").digest(), proof.challenge(b"n" * 16), said) is None
