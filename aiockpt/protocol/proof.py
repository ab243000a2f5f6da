"""How two workers prove to each other that they know the job's token, before anything else is read.

The hub sends 24 bytes: a magic and 16 random ones. The member answers 48: its proof over these and 16 random bytes of
its own; the hub's 32 bytes over those end it. Nobody who connects to the port, or who took the hub's port over, gets
further. A proof is HMAC-SHA256 with the token, over the role and the other's random bytes.
"""

from __future__ import annotations

import hashlib
import hmac

__all__ = [
    "ANSWER_NBYTES",
    "CHALLENGE_NBYTES",
    "NONCE_NBYTES",
    "PROOF_NBYTES",
    "answer",
    "challenge",
    "confirm",
    "is_challenge",
    "is_confirmed",
]

MAGIC = b"aiockpt1"
NONCE_NBYTES = 16
PROOF_NBYTES = 32
CHALLENGE_NBYTES = len(MAGIC) + NONCE_NBYTES
ANSWER_NBYTES = PROOF_NBYTES + NONCE_NBYTES


def challenge(nonce: bytes) -> bytes:
    """Return the hub's first bytes."""
    return MAGIC + nonce


def is_challenge(data: bytes) -> bool:
    """Tell whether the first bytes are those of a hub."""
    return len(data) == CHALLENGE_NBYTES and data.startswith(MAGIC)


def answer(token: bytes, challenged: bytes, nonce: bytes) -> bytes:
    """Return what the member says to a challenge."""
    return _proof(token, b"member", challenged) + nonce


def confirm(token: bytes, challenged: bytes, answered: bytes) -> bytes | None:
    """Return what the hub says to an answer, or None where it proves nothing."""
    expected = _proof(token, b"member", challenged)
    if not hmac.compare_digest(expected, answered[:PROOF_NBYTES]):
        return None
    return _proof(token, b"hub", answered[PROOF_NBYTES:])


def is_confirmed(token: bytes, answered: bytes, confirmed: bytes) -> bool:
    """Tell whether the hub has proved itself."""
    return hmac.compare_digest(_proof(token, b"hub", answered[PROOF_NBYTES:]), confirmed)


def _proof(token: bytes, role: bytes, nonce: bytes) -> bytes:
    return hmac.new(token, role + nonce, hashlib.sha256).digest()
