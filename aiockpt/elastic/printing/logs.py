"""Where the output of trainers goes: ``LogsSpecs`` says it for a run, ``LogsDest`` for each rank of one start."""

from __future__ import annotations

import itertools
import os
import re
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from aiockpt.elastic.printing.std import Std, normalise, to_map
from aiockpt.errors import ConfigError

if TYPE_CHECKING:
    from aiockpt.elastic.printing.output import Destinations

__all__ = ["DefaultLogsSpecs", "LogsDest", "LogsSpecs", "check_filters", "load_logs_specs"]

CONSOLE = ""
"""The path of a stream that goes where that of the supervisor goes."""

GROUP = "torchrun.logs_specs"
"""Entry points of plug-ins; the name is the one that torchrun looks under."""

_LONGEST_NAME = 64
"""Characters of a run id in the name of a directory, of 255 that file systems allow: random ones follow."""


@dataclass
class LogsDest:
    """Paths of the log files of one start, by local rank.

    ``""`` is the console as it is, and ``os.devnull`` nowhere.
    """

    stdouts: dict[int, str] = field(default_factory=dict)
    """What each rank gets as its descriptor 1."""
    stderrs: dict[int, str] = field(default_factory=dict)
    """What each rank gets as its descriptor 2."""
    tee_stdouts: dict[int, str] = field(default_factory=dict)
    """The ranks whose stdout is copied to the console line by line, with the path of their own file as in ``stdouts``:
    ``""`` where they have none."""
    tee_stderrs: dict[int, str] = field(default_factory=dict)
    """The same for stderr."""
    error_files: dict[int, str] = field(default_factory=dict)
    """What each rank finds in ``TORCHELASTIC_ERROR_FILE``."""
    filtered_stdout: str = ""
    """Where lines of teed stdouts that match a filter go; ``""`` where no files are made."""
    filtered_stderr: str = ""
    """The same for stderr."""


class LogsSpecs(ABC):
    """What is done with the output of trainers; derive from it to name files in a way of your own.

    Args:
        log_dir: Directory for log files.
        redirects: Streams that go to files, for all ranks or by local rank.
        tee: Streams that go to files and to the console.
        local_ranks_filter: Ranks that may write to the console; None or empty are all.

    Raises:
        ConfigError: One of them is of no use.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        redirects: Std | int | Mapping[int, Std | int] = Std.NONE,
        tee: Std | int | Mapping[int, Std | int] = Std.NONE,
        local_ranks_filter: Collection[int] | None = None,
    ) -> None:
        self._root_log_dir = _absolute(log_dir)
        self._redirects = normalise(redirects, argument="redirects")
        self._tee = normalise(tee, argument="tee")
        self._local_ranks_filter = _ranks(local_ranks_filter)

    @abstractmethod
    def reify(self, envs: Mapping[int, Mapping[str, str]]) -> LogsDest:
        """Decide on the paths of one start and make what directories they need.

        Args:
            envs: The environment of each local rank, all of ``range(nprocs)``; it is not changed, and
                ``TORCHELASTIC_ERROR_FILE`` is set by the caller from what is returned.
        """

    @property
    @abstractmethod
    def root_log_dir(self) -> str:
        """The directory that all logs are under; ``""`` while there is none."""

    def release(self) -> None:
        """Free what ``reify`` made for a start; called once for each, when its trainers are gone."""
        return


class DefaultLogsSpecs(LogsSpecs):
    """Log files by run, attempt and rank.

    ::

        <log_dir>/<run id>_<random>/attempt_<n>/<local rank>/{stdout.log,stderr.log,error.json}
        <log_dir>/<run id>_<random>/attempt_<n>/filtered_{stdout,stderr}.log

    Run id and attempt are ``TORCHELASTIC_RUN_ID`` and ``TORCHELASTIC_RESTART_COUNT`` of rank 0; characters that are
    no letter, digit, dot, dash or underscore become underscores. The directory of the run is made once for each object
    and serves all its attempts.

    **Nothing is ever overwritten or deleted.** A group may start again under the same attempt number, for a change of
    members does not count as a restart. The second start of attempt 0 goes to ``attempt_0_start_2``: it says what it
    is, stands beside its elder in a listing, and ``attempt_*`` finds both.

    Copies and pickles are new objects with the same arguments, and a directory of their own.

    Args:
        log_dir: Made if it is missing. ``os.devnull`` makes no files: teed output goes to the console alone. None
            takes a temporary directory, made by the first ``reify``, for error files are always written; ``release``
            removes it if no file is in it.
        redirects: As in ``LogsSpecs``.
        tee: As in ``LogsSpecs``; a stream that is teed is redirected too.
        local_ranks_filter: As in ``LogsSpecs``; what other ranks do not write to files is dropped.

    Raises:
        ConfigError: An argument is of no use: ``log_dir`` is a file, or redirects ask for files and there are none.

    Thread-safety: all methods.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        redirects: Std | int | Mapping[int, Std | int] = Std.NONE,
        tee: Std | int | Mapping[int, Std | int] = Std.NONE,
        local_ranks_filter: Collection[int] | None = None,
    ) -> None:
        super().__init__(log_dir, redirects, tee, local_ranks_filter)
        given = self._root_log_dir
        self._makes_files = given != os.devnull
        if self._makes_files and given is not None and os.path.exists(given) and not os.path.isdir(given):
            raise _refuse(
                "log_dir", f"{given} is not a directory", "give the path of a directory, or of none yet", given
            )
        wanted = self._redirects.values() if isinstance(self._redirects, dict) else [self._redirects]
        if not self._makes_files and any(wanted):
            raise _refuse(
                "redirects",
                f"log_dir is {os.devnull}, which makes no files, and redirects ask for some",
                "give a log_dir, or tee, which then goes to the console alone",
            )
        self._lock = threading.Lock()
        self._temporary: str | None = None  # the directory that we made in place of a log_dir
        self._run_dir: str | None = None
        self._starts = 0  # that were not released

    @property
    def root_log_dir(self) -> str:
        """The absolute path of ``log_dir``, or of the temporary directory while there is one, else ``""``."""
        return self._root_log_dir or self._temporary or ""

    def reify(self, envs: Mapping[int, Mapping[str, str]]) -> LogsDest:
        """Make the directories of one start and return the paths in them; none of the files is made.

        It blocks on the file system.

        Raises:
            ConfigError: The ranks are not ``range(nprocs)``, a map or a filter names others, or a directory cannot be
                made; the ``__cause__`` says why.
        """
        nprocs = len(envs)
        if not envs or set(envs) != set(range(nprocs)):
            raise _refuse("envs", f"the ranks are {sorted(envs)}", "give the environment of each of the ranks 0 to n-1")
        redirects = to_map(self._redirects, nprocs, argument="redirects")
        tee = to_map(self._tee, nprocs, argument="tee")
        shown = self._local_ranks_filter or frozenset(range(nprocs))
        if max(shown) >= nprocs:
            why = f"it names rank {max(shown)}, and the ranks of this host are 0 to {nprocs - 1}"
            raise _refuse("local_ranks_filter", why, "name ranks of this host")
        with self._lock:
            attempt = self._make_directories(nprocs, envs[0]) if self._makes_files else None
            self._starts += 1
        files = LogsDest()
        if attempt is not None:
            files.filtered_stdout = os.path.join(attempt, "filtered_stdout.log")
            files.filtered_stderr = os.path.join(attempt, "filtered_stderr.log")
        for rank in range(nprocs):
            home = None if attempt is None else os.path.join(attempt, str(rank))
            files.error_files[rank] = "" if home is None else os.path.join(home, "error.json")
            for stream, name, paths, teed in (
                (Std.OUT, "stdout.log", files.stdouts, files.tee_stdouts),
                (Std.ERR, "stderr.log", files.stderrs, files.tee_stderrs),
            ):
                if home is not None and stream in redirects[rank] | tee[rank]:
                    paths[rank] = os.path.join(home, name)
                else:
                    paths[rank] = CONSOLE if rank in shown else os.devnull
                if stream in tee[rank] and rank in shown:
                    teed[rank] = paths[rank]
        return files

    def release(self) -> None:
        """Remove the temporary directory once no start uses it and if no file is in it; never anything else."""
        with self._lock:
            self._starts = max(0, self._starts - 1)
            self._remove_temporary()

    def _make_directories(self, nprocs: int, env: Mapping[str, str]) -> str:
        """Make the directories of one start and return that of the attempt."""
        try:
            # Looked for each time: what lies in a temporary directory for weeks is swept away, and runs take that long.
            if self._root_log_dir is None and not _is_directory(self._temporary):
                self._temporary = tempfile.mkdtemp(prefix="aiockpt_")
            if not _is_directory(self._run_dir):
                os.makedirs(self.root_log_dir, exist_ok=True)
                prefix = _file_name(env.get("TORCHELASTIC_RUN_ID", ""), "run") + "_"
                self._run_dir = tempfile.mkdtemp(prefix=prefix, dir=self.root_log_dir)
            assert self._run_dir is not None
            attempt = _new_directory(
                os.path.join(self._run_dir, "attempt_" + _file_name(env.get("TORCHELASTIC_RESTART_COUNT", ""), "0"))
            )
            for rank in range(nprocs):
                os.mkdir(os.path.join(attempt, str(rank)))
        except OSError as exc:
            self._remove_temporary()
            raise _refuse(
                "log_dir",
                f"no directory can be made in {self.root_log_dir or tempfile.gettempdir()}: {exc}",
                "give a log_dir on a file system that has room and that you may write to",
                self.root_log_dir,
            ) from exc
        return attempt

    def _remove_temporary(self) -> None:
        if self._temporary is None or self._starts:
            return
        found = list(os.walk(self._temporary, topdown=False))
        if any(
            files or any(os.path.islink(os.path.join(path, name)) for name in names) for path, names, files in found
        ):
            return
        with suppress(OSError):  # somebody put a file there meanwhile; rmdir takes none with it
            for path, _, _ in found:
                os.rmdir(path)
        if not os.path.exists(self._temporary):
            self._temporary = self._run_dir = None

    def _arguments(self) -> tuple[Any, ...]:
        return self._root_log_dir, self._redirects, self._tee, self._local_ranks_filter

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DefaultLogsSpecs):
            return NotImplemented
        return self._arguments() == other._arguments()

    def __repr__(self) -> str:
        log_dir, redirects, tee, ranks = self._arguments()
        ranks = None if ranks is None else set(ranks)
        return f"{type(self).__name__}({log_dir=}, {redirects=}, {tee=}, local_ranks_filter={ranks!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments()


def check_filters(logs: Destinations, *, stdout_filters: Sequence[str], stderr_filters: Sequence[str]) -> None:
    """Refuse line filters whose lines would have no file to go to.

    Raises:
        ConfigError: Names the filters.
    """
    for name, filters, path in (
        ("duplicate_stdout_filters", stdout_filters, logs.filtered_stdout),
        ("duplicate_stderr_filters", stderr_filters, logs.filtered_stderr),
    ):
        if filters and path in ("", os.devnull):
            raise _refuse(name, "the lines go to a file, and the logs specs make none", "give a log_dir, or no filters")


def load_logs_specs(name: str) -> type[LogsSpecs]:
    """Return the class that a plug-in registers under ``torchrun.logs_specs``; ``"default"`` is ours.

    torch registers its own class under that name too, which is none of ours and is not looked at.

    Raises:
        ConfigError: No plug-in has this name, it cannot be imported, or it is no class that derives from ``LogsSpecs``.
    """
    if name == "default":
        return DefaultLogsSpecs
    known = {plug_in.name: plug_in for plug_in in entry_points(group=GROUP)}
    if name not in known:
        names = ", ".join(sorted({"default", *known}))
        raise _refuse(
            "logs_specs", f"no installed package registers {name!r} under {GROUP}", f"take one of these: {names}"
        )
    loaded = _load(known[name])
    if not (isinstance(loaded, type) and issubclass(loaded, LogsSpecs)):
        why = f"{known[name].value}, registered as {name!r}, does not derive from aiockpt.elastic.LogsSpecs"
        raise _refuse("logs_specs", why, 'derive it from that class, or take "default"')
    return loaded


def _load(plug_in: EntryPoint) -> object:
    try:
        return plug_in.load()
    except Exception as exc:  # whatever the plug-in's module does
        raise _refuse(
            "logs_specs",
            f"{plug_in.value}, registered as {plug_in.name!r}, was not imported: {type(exc).__name__}: {exc}",
            'repair the package that registers it, or take "default"',
        ) from exc


def _absolute(log_dir: str | os.PathLike[str] | None) -> str | None:
    """Return an absolute path, for trainers may change their directory; None for none and for ``""``."""
    if log_dir is None or log_dir == "":
        return None
    path = os.fspath(log_dir) if isinstance(log_dir, os.PathLike) else log_dir
    if not isinstance(path, str) or "\0" in path:
        raise _refuse("log_dir", f"{log_dir!r} is no path as text", "give the path of a directory")
    return os.path.abspath(path)


def _ranks(ranks: Collection[int] | None) -> frozenset[int] | None:
    if ranks is None:
        return None
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise _refuse("local_ranks_filter", f"{rank!r} is no local rank", "give a set of ints, as in {0, 1}")
    return frozenset(ranks)


def _file_name(text: str, otherwise: str) -> str:
    """Return what of a text can stand in the name of a directory on any file system and in any shell."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", text[:_LONGEST_NAME])
    return re.sub(r"^[.-]", "_", name) or otherwise


def _is_directory(path: str | None) -> bool:
    return path is not None and os.path.isdir(path)


def _new_directory(path: str) -> str:
    """Make a directory that nobody made before, under this name or the next that is free."""
    for start in itertools.count(1):
        candidate = path if start == 1 else f"{path}_start_{start}"
        with suppress(FileExistsError):
            os.mkdir(candidate)
            return candidate
    raise AssertionError("counting has no end")


def _refuse(argument: str, why: str, next: str, path: str | None = None) -> ConfigError:
    return ConfigError(f"{argument} was refused", why=why, next=next, argument=argument, path=path)
