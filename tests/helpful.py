"""What every error must have: its very type, its facts in fields, and a text that says what, why and what to do."""

from __future__ import annotations

from typing import Any


def assert_helpful(error: BaseException, kind: type[BaseException], **fields: Any) -> None:
    """Fail unless an error is of this type itself, has these fields, and all three parts of a message."""
    assert type(error) is kind, repr(error)
    what, *rest = str(error).split("\nwhy: ")
    assert what, "it does not say what"
    assert len(rest) == 1, f"it does not say why: {error}"
    why, *rest = rest[0].split("\nnext: ")
    assert why
    assert len(rest) == 1, f"it does not say what to do: {error}"
    assert rest[0]
    found = {name: getattr(error, name) for name in fields}
    assert found == fields, f"its fields are {found}, expected: {fields}"
