"""An observer that keeps what it is told."""

from __future__ import annotations

import threading

import aiockpt


class Recorder(aiockpt.Observer):
    """Keeps every call, and the thread that it came from."""

    def __init__(self) -> None:
        self.begun: list[aiockpt.Span] = []
        self.ended: list[tuple[aiockpt.Span, int, BaseException | None]] = []
        self.threads: set[str] = set()

    def started(self, span: aiockpt.Span) -> None:
        self.threads.add(threading.current_thread().name)
        self.begun.append(span)

    def completed(self, span: aiockpt.Span, elapsed_ns: int) -> None:
        self.threads.add(threading.current_thread().name)
        self.ended.append((span, elapsed_ns, None))

    def failed(self, span: aiockpt.Span, elapsed_ns: int, error: BaseException) -> None:
        self.threads.add(threading.current_thread().name)
        self.ended.append((span, elapsed_ns, error))

    @property
    def spans(self) -> dict[int, aiockpt.Span]:
        """Those that ended, as they were then, by id."""
        return {span.id: span for span, _, _ in self.ended}

    def ends(self, name: str) -> list[tuple[aiockpt.Span, int, BaseException | None]]:
        """Every end of a span of this name, in order."""
        return [end for end in self.ended if end[0].name == name]

    def one(self, name: str) -> tuple[aiockpt.Span, int, BaseException | None]:
        """The only end of a span of this name."""
        (end,) = self.ends(name)
        return end

    def parts(self, span: aiockpt.Span) -> list[str]:
        """Names of the spans that are parts of this one, in the order of their beginning."""
        return [other.name for other in self.begun if other.parent_id == span.id]
