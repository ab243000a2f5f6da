"""The error of a group of processes that failed; the one module here that imports torch for a class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.distributed.elastic.multiprocessing import errors as torch_errors

from aiockpt.elastic.failures.process_failure import ProcessFailure
from aiockpt.elastic.failures.report import format_report, root_cause_of
from aiockpt.errors import ConfigError

__all__ = ["ChildFailedError"]


class ChildFailedError(torch_errors.ChildFailedError):
    """Processes failed; the text is the report, and the root cause is chosen by ``by_cause``.

    It is torch's class of this name to ``except`` and to torch's ``record``.

    Args:
        name: Of what failed.
        failures: By global rank.

    Raises:
        ConfigError: There are no failures.
    """

    failures: dict[int, ProcessFailure]  # type: ignore[assignment]  # ours have all that torch's have

    def __init__(self, name: str, failures: Mapping[int, ProcessFailure]) -> None:
        if not failures:
            raise ConfigError(
                f"no error was made of the failures of {name!r}",
                why="there are none",
                next="raise it only where a process failed",
                argument="failures",
            )
        super().__init__(name, dict(failures))  # type: ignore[arg-type]  # as above

    def get_first_failure(self) -> tuple[int, ProcessFailure]:  # type: ignore[override]  # as above
        """Return the global rank and the failure that is the root cause."""
        return root_cause_of(self.failures)

    def format_msg(self, boarder_delim: str = "=", section_delim: str = "-") -> str:
        """Return the report; the arguments are torch's, and have no effect."""
        return format_report(self.name, self.failures)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.name, self.failures, getattr(self, "__notes__", []))


def _rebuild(
    cls: type[ChildFailedError], name: str, failures: dict[int, ProcessFailure], notes: list[str]
) -> ChildFailedError:
    error = cls(name, failures)
    for note in notes:
        error.add_note(note)
    return error
