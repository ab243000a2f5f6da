"""What a program of the user's hears of a run: spans, told to an ``Observer``."""

from __future__ import annotations

from typing import Protocol

import msgspec

__all__ = ["Observer", "Span"]


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of work with a beginning and an end."""

    name: str
    """What is done: ``open``, ``save``, ``stage``, …; docs/observability.md lists them."""
    id: int
    """A random number of 48 bits, so that one observer may serve several Checkpointers."""
    parent_id: int | None = None
    """The span that it is a part of."""
    started_at_ns: int
    """When it began, in nanoseconds since 1970 by the machine's clock, as OpenTelemetry counts."""
    attributes: dict[str, str | int | float | bool] = {}
    """What is known of it: ``step``, ``save_id``, ``nbytes``, …; the end has what the beginning had, and more."""


class Observer(Protocol):
    """Is told of every span at its beginning and at its end.

    Derive from it and define what is of interest; the rest does nothing. All calls of a Checkpointer come one after
    another from one thread that does nothing else: a slow observer delays neither training nor saves, and one that
    raises harms nothing and is logged once. A span that ends has the ``id`` of the one that began.
    """

    # Each method returns by a statement: an empty one would count as abstract, and had to be defined by everybody.

    def started(self, span: Span) -> None:
        """A piece of work began; every one that did is completed or failed later."""
        return

    def completed(self, span: Span, elapsed_ns: int) -> None:
        """It ended well, ``elapsed_ns`` nanoseconds after its beginning."""
        return

    def failed(self, span: Span, elapsed_ns: int, error: BaseException) -> None:
        """It ended by ``error``; a save that was cancelled too, by SaveCancelledError."""
        return
