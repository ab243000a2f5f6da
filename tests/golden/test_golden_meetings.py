"""Bytes of the messages by which ranks meet: written once, never made again by a test."""

from __future__ import annotations

import pytest

from aiockpt.protocol.frames import StarDecoder, encode
from aiockpt.protocol.star import Attend, Met, Recall, StarMessage
from aiockpt.protocol.terms import Damage, WireError
from tests.golden.test_golden import read_hex

CORRUPT = WireError(
    kind="corrupt",
    what="step-5/model/a is damaged at byte 4096 (rank 3 on host gpu-17)",
    why="a block's checksum does not fit",
    next="restore another step",
    phase="read",
    damage=Damage(step=5, file="step-5/model/a", offset=4096, expected="00ff", found="01ff"),
)
MET = Met(meeting="restore 1, propose 1", word=b"\x00\xff")
MESSAGES: dict[str, StarMessage] = {
    "attend": Attend(meeting="restore 1, propose 1", claim="restore(step=5)", word=b"\x00\xff"),
    "attend-bare": Attend(meeting="restore 1, match 1", claim=""),
    "attend-error": Attend(meeting="restore 1, read 1", claim="restore(step=5)", error=CORRUPT),
    "met": MET,
    "met-error": Met(meeting="restore 1, read 1", error=CORRUPT),
    "recall": Recall(mets=[MET]),
    "recall-bare": Recall(mets=[]),
}
FRAMES = read_hex("meetings-1.hex")


def test_golden_meetings_are_complete() -> None:
    assert FRAMES.keys() == MESSAGES.keys()


@pytest.mark.parametrize("name", MESSAGES)
def test_meetings_1(name: str) -> None:
    """Version 1 is these bytes, in both directions."""
    assert encode(MESSAGES[name]) == FRAMES[name]
    assert StarDecoder().feed(FRAMES[name]) == [MESSAGES[name]]
