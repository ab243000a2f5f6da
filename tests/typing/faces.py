"""What a type checker sees of the public faces; checked by mypy, never run."""

from __future__ import annotations

from typing import Any, assert_type

import aiockpt
from aiockpt import blocking


async def asynchronous(ckpt: aiockpt.Checkpointer, state: dict[str, Any]) -> None:
    assert_type(ckpt.save(0, state), aiockpt.Save[aiockpt.Saved])
    assert_type(await ckpt.save(0, state), aiockpt.Saved)
    assert_type(await ckpt.save(0, state, when_busy="raise").result(1), aiockpt.Saved)
    assert_type(await ckpt.save(0, state, when_busy="skip"), aiockpt.Saved | None)
    assert_type(await ckpt.restore(state), aiockpt.Restored | None)
    assert_type(await ckpt.steps(), list[int])
    assert_type(await aiockpt.load("run"), dict[str, Any])
    async with aiockpt.Checkpointer("run", keep=aiockpt.Latest(3), every=aiockpt.Every(minutes=5)) as opened:
        assert_type(opened, aiockpt.Checkpointer)
        assert_type(opened.due(3), str | None)


def synchronous(ckpt: blocking.Checkpointer, state: dict[str, Any]) -> None:
    assert_type(ckpt.save(0, state), blocking.Save[aiockpt.Saved])
    assert_type(ckpt.save(0, state).result(), aiockpt.Saved)
    assert_type(ckpt.save(0, state, when_busy="skip").result(), aiockpt.Saved | None)
    assert_type(ckpt.restore(state, step=3), aiockpt.Restored | None)
    assert_type(blocking.steps("run"), list[int])
    assert_type(ckpt.statistics(), aiockpt.Statistics)
    assert_type(ckpt.statistics().phases.stage.total_s, float)


class Watching(aiockpt.Observer):
    """Defines what it is interested in, and inherits the rest."""

    def completed(self, span: aiockpt.Span, elapsed_ns: int) -> None:
        assert_type(span.parent_id, int | None)
        assert_type(span.attributes, dict[str, str | int | float | bool])


class Alike:
    """Derives from nothing, and is an observer all the same."""

    def started(self, span: aiockpt.Span) -> None: ...
    def completed(self, span: aiockpt.Span, elapsed_ns: int) -> None: ...
    def failed(self, span: aiockpt.Span, elapsed_ns: int, error: BaseException) -> None: ...


def observed() -> None:
    aiockpt.Checkpointer("run", observer=Watching())
    blocking.Checkpointer("run", observer=Alike())
