"""Start, watch and stop the trainers of a host: asyncio-native, with the names of ``torch.distributed.elastic``.

Importing this package imports neither torch nor anyio: names are loaded when they are first used (PEP 562), so that the
guardian and the children stay small.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # that of typing, whose import the guardian does not wait for
if TYPE_CHECKING:
    from typing import Any

    from aiockpt.elastic import blocking
    from aiockpt.elastic.context import MultiprocessContext, PContext, SubprocessContext
    from aiockpt.elastic.failures.child_failed import ChildFailedError
    from aiockpt.elastic.failures.error_file import ErrorHandler, get_error_handler, record, worker_main
    from aiockpt.elastic.failures.process_failure import Cause, ProcessFailure
    from aiockpt.elastic.failures.report import format_report
    from aiockpt.elastic.failures.unreaped import Unreaped
    from aiockpt.elastic.numa import AffinityMode, NumaOptions
    from aiockpt.elastic.printing.logs import DefaultLogsSpecs, LogsDest, LogsSpecs, load_logs_specs
    from aiockpt.elastic.printing.output_statistics import OutputStatistics
    from aiockpt.elastic.printing.std import Std, to_map
    from aiockpt.elastic.results import ProcessStatistics, RunProcsResult
    from aiockpt.elastic.signals import SignalException
    from aiockpt.elastic.start import start_processes

__all__ = [
    "AffinityMode",
    "Cause",
    "ChildFailedError",
    "DefaultLogsSpecs",
    "ErrorHandler",
    "LogsDest",
    "LogsSpecs",
    "MultiprocessContext",
    "NumaOptions",
    "OutputStatistics",
    "PContext",
    "ProcessFailure",
    "ProcessStatistics",
    "RunProcsResult",
    "SignalException",
    "Std",
    "SubprocessContext",
    "Unreaped",
    "blocking",
    "format_report",
    "get_error_handler",
    "load_logs_specs",
    "record",
    "start_processes",
    "to_map",
    "worker_main",
]

_HOMES = {
    "failures.child_failed": ("ChildFailedError",),
    "context": ("MultiprocessContext", "PContext", "SubprocessContext"),
    "failures.error_file": ("ErrorHandler", "get_error_handler", "record", "worker_main"),
    "printing.logs": ("DefaultLogsSpecs", "LogsDest", "LogsSpecs", "load_logs_specs"),
    "numa": ("AffinityMode", "NumaOptions"),
    "printing.output_statistics": ("OutputStatistics",),
    "failures.process_failure": ("Cause", "ProcessFailure"),
    "failures.report": ("format_report",),
    "results": ("ProcessStatistics", "RunProcsResult"),
    "signals": ("SignalException",),
    "start": ("start_processes",),
    "printing.std": ("Std", "to_map"),
    "failures.unreaped": ("Unreaped",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
"""Where each name is defined, below this package."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'aiockpt.elastic' has no attribute {name!r}")
    if name == "blocking":
        return importlib.import_module("aiockpt.elastic.blocking")
    value = getattr(importlib.import_module(f"aiockpt.elastic.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
