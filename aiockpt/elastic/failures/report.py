"""The report of failed processes, for people: the root cause, the others, and why it is that one."""

from __future__ import annotations

from collections.abc import Mapping

from aiockpt.elastic.failures.error_data import NOT_AVAILABLE
from aiockpt.elastic.failures.process_failure import Cause, ProcessFailure
from aiockpt.elastic.failures.root_cause import by_cause, rule_used

__all__ = ["format_report", "root_cause_of"]

_WIDEST = 60
"""Columns of the borders, as torch's."""
_INDENT = "  "

# Lines shown of each failure. A job of many ranks has many failures and one cause.
_TEXT_LINES = 200
_ROOT_OUTPUT_LINES = 60
_ROOT_STACKS_LINES = 200
_OTHER_OUTPUT_LINES = 10
_OTHER_STACKS_LINES = 30
_LONGEST_LINE = 2000


def root_cause_of(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Return the global rank and the failure that is the root cause by ``by_cause``."""
    first = by_cause(failures.values())[0]
    return next((rank, failure) for rank, failure in failures.items() if failure is first)


def format_report(name: str, failures: Mapping[int, ProcessFailure]) -> str:
    """Return the report.

    Args:
        name: Of what failed.
        failures: By global rank; at least one.
    """
    ordered = by_cause(failures.values())
    root_text, others = "", []
    for index, (rank, failure) in enumerate(failures.items()):
        if failure is ordered[0]:
            root_text = _format_one(index, rank, failure, rule=rule_used(ordered))
        else:
            others.append(_format_one(index, rank, failure, rule=""))
    title = f"{name} FAILED"
    widest = max(len(line) for text in (title, root_text, *others) for line in text.split("\n"))
    border, section = "=" * min(widest, _WIDEST), "-" * min(widest, _WIDEST)
    parts = [
        "",
        border,
        title,
        section,
        "Failures:",
        *(others or [f"{_INDENT}<NO_OTHER_FAILURES>"]),
        section,
        "Root Cause (first observed failure):",
        root_text,
        border,
    ]
    # A text of JSON may hold half a surrogate pair, which no stream would take.
    return "\n".join(parts).encode("utf-8", "backslashreplace").decode("utf-8")


def _format_one(index: int, rank: int, failure: ProcessFailure, *, rule: str) -> str:
    """Return one failure; that with a rule is the root cause, and shown at greater length."""
    signal_name = failure.signal_name()
    fields = {
        "time": failure.timestamp_isoformat(),
        "host": failure.hostname,
        "rank": f"{rank} (local_rank: {failure.local_rank})",
        "exitcode": f"{failure.exitcode} (pid: {failure.pid})"
        + (f" ({signal_name})" if signal_name != NOT_AVAILABLE else ""),
        "cause": failure.cause_in_words(),
    }
    if rule:
        fields["chosen"] = rule
    fields["error_file"] = failure.error_file
    fields["traceback"] = _indent(_last_lines(failure.text().rstrip("\n"), _TEXT_LINES))
    if not failure.has_own_error and (rule or failure.cause is not Cause.STOPPED):
        lines = _ROOT_OUTPUT_LINES if rule else _OTHER_OUTPUT_LINES
        _add_block(fields, "output", failure.output_tail, lines)
    _add_block(fields, "stacks", failure.stacks, _ROOT_STACKS_LINES if rule else _OTHER_STACKS_LINES)
    return "\n".join([f"[{index}]:", *(f"{_INDENT}{label:<10}: {text}" for label, text in fields.items())])


def _add_block(fields: dict[str, str], label: str, text: str, lines: int) -> None:
    text = text.rstrip("\n")
    if text:
        fields[label] = _indent("\n" + _last_lines(text, lines))


def _indent(text: str) -> str:
    return text.replace("\n", f"\n{_INDENT}")


def _last_lines(text: str, count: int) -> str:
    """Return the end of a text, and how much is left out before it."""
    lines = [
        line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}... ({len(line)} characters)"
        for line in text.split("\n")
    ]
    if len(lines) <= count:
        return "\n".join(lines)
    return "\n".join([f"... {len(lines) - count} lines before these ...", *lines[-count:]])
