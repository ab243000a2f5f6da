"""Where the logs of trainers go: directories, tee, the filter of ranks, plug-ins."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from aiockpt.elastic.printing.logs import DefaultLogsSpecs, LogsDest, LogsSpecs, check_filters, load_logs_specs
from aiockpt.elastic.printing.std import Std
from aiockpt.errors import ConfigError


def envs(nprocs: int, run_id: str = "exp", restarts: str = "0") -> dict[int, dict[str, str]]:
    own = {"TORCHELASTIC_RUN_ID": run_id, "TORCHELASTIC_RESTART_COUNT": restarts}
    return {rank: {"RANK": str(rank), **own} for rank in range(nprocs)}


def refused(call: Callable[[], Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        call()
    assert all((caught.value.what, caught.value.why, caught.value.next))
    return caught.value


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of temporary files, for this test alone."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def test_names_of_files(tmp_path: Path) -> None:
    """A start has a directory for each rank under run and attempt, and no file in it yet (R-MP-35, R-MP-36)."""
    root = tmp_path / "not" / "yet"
    specs = DefaultLogsSpecs(str(root), redirects=Std.ALL, tee=Std.OUT)
    assert specs.root_log_dir == str(root)
    logs = specs.reify(envs(2))
    (run,) = root.iterdir()
    assert run.name.startswith("exp_")
    attempt = run / "attempt_0"
    assert logs.stdouts == {0: f"{attempt}/0/stdout.log", 1: f"{attempt}/1/stdout.log"}
    assert logs.stderrs == {0: f"{attempt}/0/stderr.log", 1: f"{attempt}/1/stderr.log"}
    assert logs.tee_stdouts == logs.stdouts
    assert logs.tee_stderrs == {}
    assert logs.error_files == {0: f"{attempt}/0/error.json", 1: f"{attempt}/1/error.json"}
    assert (logs.filtered_stdout, logs.filtered_stderr) == (
        f"{attempt}/filtered_stdout.log",
        f"{attempt}/filtered_stderr.log",
    )
    assert sorted(path.name for path in attempt.iterdir()) == ["0", "1"]
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_envs_are_not_changed(tmp_path: Path) -> None:
    """What it is told of the environment stays as it was (R-MP-34)."""
    given = envs(2)
    before = copy.deepcopy(given)
    DefaultLogsSpecs(tmp_path).reify(given)
    assert given == before


def test_console_by_default(tmp_path: Path) -> None:
    """Streams that nothing is asked for go to the console, and have an error file all the same (R-MP-34)."""
    logs = DefaultLogsSpecs(tmp_path).reify(envs(2))
    assert logs.stdouts == logs.stderrs == {0: "", 1: ""}
    assert logs.tee_stdouts == logs.tee_stderrs == {}
    assert all(logs.error_files.values())


def test_tee_implies_redirect(tmp_path: Path) -> None:
    """A stream that is teed has a file; the tee of a rank adds to its redirects (R-MP-38)."""
    logs = DefaultLogsSpecs(tmp_path, redirects={0: Std.ERR}, tee={0: Std.OUT, 1: 3}).reify(envs(3))
    names = [{rank: os.path.basename(path) for rank, path in paths.items()} for paths in (logs.stdouts, logs.stderrs)]
    assert names == [{0: "stdout.log", 1: "stdout.log", 2: ""}, {0: "stderr.log", 1: "stderr.log", 2: ""}]
    assert logs.tee_stdouts == {0: logs.stdouts[0], 1: logs.stdouts[1]}
    assert logs.tee_stderrs == {1: logs.stderrs[1]}


def test_filter_of_ranks(tmp_path: Path) -> None:
    """Ranks outside the filter write to files alone, and nowhere where they have none (R-MP-39)."""
    logs = DefaultLogsSpecs(tmp_path, redirects=Std.NONE, tee=Std.OUT, local_ranks_filter={1}).reify(envs(2))
    assert logs.tee_stdouts == {1: logs.stdouts[1]}
    assert os.path.basename(logs.stdouts[0]) == "stdout.log"
    assert logs.stderrs == {0: os.devnull, 1: ""}


@pytest.mark.parametrize("ranks", [None, set(), [0, 1]], ids=repr)
def test_filter_of_all_ranks(tmp_path: Path, ranks: Any) -> None:
    """No filter, an empty one and one of all ranks are alike (R-MP-39)."""
    logs = DefaultLogsSpecs(tmp_path, tee=Std.OUT, local_ranks_filter=ranks).reify(envs(2))
    assert set(logs.tee_stdouts) == {0, 1}
    assert logs.stderrs == {0: "", 1: ""}


def test_second_start_of_an_attempt(tmp_path: Path) -> None:
    """A second start of the same attempt has a name of its own, and the first keeps its files (E-49, R-MP-37)."""
    specs = DefaultLogsSpecs(tmp_path, redirects=Std.ALL)
    first = specs.reify(envs(2))
    for path in (*first.stdouts.values(), *first.error_files.values()):
        Path(path).write_text("kept")
    later = [specs.reify(envs(2)) for _ in range(3)]
    assert {Path(path).read_text() for path in (*first.stdouts.values(), *first.error_files.values())} == {"kept"}
    (run,) = tmp_path.iterdir()
    assert sorted(path.name for path in run.iterdir()) == [
        *("attempt_0", "attempt_0_start_2", "attempt_0_start_3", "attempt_0_start_4"),
    ]
    assert len({logs.stdouts[0] for logs in (first, *later)}) == 4


def test_attempts_share_a_run(tmp_path: Path) -> None:
    """One object keeps one directory for all its attempts; another object has another (R-MP-36, R-MP-37)."""
    specs = DefaultLogsSpecs(tmp_path)
    for restarts in ("0", "1", "12"):
        specs.reify(envs(1, restarts=restarts))
        specs.release()
    (run,) = tmp_path.iterdir()
    assert sorted(path.name for path in run.iterdir()) == ["attempt_0", "attempt_1", "attempt_12"]
    DefaultLogsSpecs(tmp_path).reify(envs(1))
    assert len(list(tmp_path.iterdir())) == 2


def test_environment_says_nothing(tmp_path: Path) -> None:
    """Run and attempt have names without the variables too (R-MP-37)."""
    logs = DefaultLogsSpecs(tmp_path).reify({0: {}})
    assert Path(logs.error_files[0]).parts[-3:-1] == ("attempt_0", "0")
    (run,) = tmp_path.iterdir()
    assert run.name.startswith("run_")


RUN_IDS = [
    *("team/exp", "/absolute", "../../up", "..", ".hidden", "-rf", "a b\tc\n", "a\0b", "ünïcode", "", "x" * 5000),
    *("$(id)", "a:b", "\udc80"),
]


@pytest.mark.parametrize("run_id", RUN_IDS, ids=lambda text: ascii(text)[:12])
def test_odd_run_ids(tmp_path: Path, run_id: str) -> None:
    """A run id of any text makes one directory in the log directory, with a harmless name (E-50, R-MP-37)."""
    specs = DefaultLogsSpecs(tmp_path / "logs", redirects=Std.OUT)
    logs = specs.reify(envs(1, run_id, restarts=run_id))
    (run,) = (tmp_path / "logs").iterdir()
    (attempt,) = run.iterdir()
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
    assert Path(logs.stdouts[0]) == attempt / "0" / "stdout.log"
    assert len(run.name) < 100
    assert run.name.isascii()
    assert not run.name.startswith((".", "-"))


def test_file_as_log_dir(tmp_path: Path) -> None:
    """A log directory that is a file, or under one, is refused by name (R-MP-36)."""
    file = tmp_path / "file"
    file.touch()
    error = refused(lambda: DefaultLogsSpecs(file))
    assert error.path == str(file)
    assert isinstance(error, ValueError)
    error = refused(lambda: DefaultLogsSpecs(file / "below").reify(envs(1)))
    assert isinstance(error.__cause__, NotADirectoryError)
    refused(lambda: DefaultLogsSpecs("/dev/full"))


def test_log_dir_that_is_there(tmp_path: Path) -> None:
    """A directory with other files in it is fine, and they stay (R-MP-36)."""
    (tmp_path / "notes").write_text("mine")
    specs = DefaultLogsSpecs(tmp_path)
    specs.reify(envs(1))
    specs.release()
    assert (tmp_path / "notes").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_log_dir_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers that change their directory find their files (R-MP-36)."""
    monkeypatch.chdir(tmp_path)
    specs = DefaultLogsSpecs("logs", redirects=Std.ALL)
    logs = specs.reify(envs(1))
    for path in (logs.stdouts[0], logs.error_files[0], logs.filtered_stdout, specs.root_log_dir):
        assert path.startswith(f"{tmp_path}/logs")


BAD: list[dict[str, Any]] = [
    *({"log_dir": value} for value in (b"bytes", "a\0b", 3, True)),
    *({"redirects": value} for value in (4, "1", {0: 7}, None)),
    *({"tee": value} for value in (-1, {"0": 1})),
    *({"local_ranks_filter": value} for value in ({-1}, {"0"}, "0,1", {True})),
]


@pytest.mark.parametrize("arguments", BAD, ids=lambda arguments: ascii(arguments))
def test_bad_arguments(arguments: dict[str, Any]) -> None:
    """What could only fail later is refused at once, by name (R-MP-34)."""
    assert refused(lambda: DefaultLogsSpecs(**arguments)).argument == next(iter(arguments))


@pytest.mark.parametrize("name", ["redirects", "tee", "local_ranks_filter"])
def test_ranks_that_do_not_exist(tmp_path: Path, name: str) -> None:
    """A map or a filter that names a rank that this host does not have is an error before anything is made (E-48)."""
    value: Any = {2} if name == "local_ranks_filter" else {2: Std.OUT}
    specs = DefaultLogsSpecs(tmp_path, **{name: value})
    assert refused(lambda: specs.reify(envs(2))).argument == name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranks", [[], [1], [0, 2]], ids=repr)
def test_ranks_with_gaps(tmp_path: Path, ranks: list[int]) -> None:
    """The environments are those of the ranks 0 to n-1 (R-MP-34)."""
    assert refused(lambda: DefaultLogsSpecs(tmp_path).reify({rank: {} for rank in ranks})).argument == "envs"


def test_no_files(tmp_path: Path, temporary: Path) -> None:
    """With ``os.devnull`` there are no files, and tee goes to the console alone (E-51, R-MP-40)."""
    specs = DefaultLogsSpecs(os.devnull, tee={0: Std.ALL, 1: Std.OUT, 2: Std.OUT}, local_ranks_filter={0, 1})
    logs = specs.reify(envs(3))
    assert logs == LogsDest(
        stdouts={0: "", 1: "", 2: os.devnull},
        stderrs={0: "", 1: "", 2: os.devnull},
        tee_stdouts={0: "", 1: ""},
        tee_stderrs={0: ""},
        error_files={0: "", 1: "", 2: ""},
    )
    assert specs.root_log_dir == os.devnull
    specs.release()
    assert list(temporary.iterdir()) == []
    assert os.path.exists(os.devnull)


@pytest.mark.parametrize("redirects", [Std.OUT, 3, {0: Std.NONE, 1: Std.ERR}], ids=repr)
def test_redirects_without_files(redirects: Any) -> None:
    """Redirects with ``os.devnull`` are a contradiction, and refused as one (E-51, R-MP-40)."""
    assert refused(lambda: DefaultLogsSpecs(os.devnull, redirects=redirects)).argument == "redirects"
    DefaultLogsSpecs(os.devnull, redirects={0: Std.NONE})


def test_filters_without_files(tmp_path: Path) -> None:
    """Line filters with ``os.devnull`` are refused by name, and taken where there are files (E-51, R-MP-40)."""
    none = DefaultLogsSpecs(os.devnull, tee=Std.ALL).reify(envs(1))
    out = refused(lambda: check_filters(none, stdout_filters=["loss"], stderr_filters=[]))
    assert out.argument == "duplicate_stdout_filters"
    err = refused(lambda: check_filters(none, stdout_filters=[], stderr_filters=["loss"]))
    assert err.argument == "duplicate_stderr_filters"
    check_filters(none, stdout_filters=[], stderr_filters=[])
    files = DefaultLogsSpecs(tmp_path).reify(envs(1))
    check_filters(files, stdout_filters=["loss"], stderr_filters=["loss"])


def test_temporary_directory_without_files(temporary: Path) -> None:
    """Without a log directory a temporary one is made when it is needed, and removed if nothing is in it (E-52)."""
    specs = DefaultLogsSpecs()
    assert specs.root_log_dir == ""
    assert list(temporary.iterdir()) == []
    logs = specs.reify(envs(2))
    (made,) = temporary.iterdir()
    assert specs.root_log_dir == str(made)
    assert os.path.isdir(os.path.dirname(logs.error_files[1]))
    specs.release()
    assert list(temporary.iterdir()) == []
    assert specs.root_log_dir == ""
    again = specs.reify(envs(2))
    assert os.path.isdir(os.path.dirname(again.error_files[1]))


@pytest.mark.parametrize("name", ["error.json", "stdout.log"])
def test_temporary_directory_with_a_file(temporary: Path, name: str) -> None:
    """A temporary directory with any file in it stays whole, and serves the next attempt (E-52)."""
    specs = DefaultLogsSpecs()
    logs = specs.reify(envs(2))
    Path(logs.error_files[1]).with_name(name).touch()
    before = sorted(temporary.rglob("*"))
    specs.release()
    assert sorted(temporary.rglob("*")) == before
    specs.reify(envs(2, restarts="1"))
    assert len(list(temporary.iterdir())) == 1


def test_temporary_directory_with_a_link(temporary: Path, tmp_path: Path) -> None:
    """A link is somebody's, and nothing behind it is touched (E-52)."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    specs = DefaultLogsSpecs()
    link = Path(specs.reify(envs(1)).error_files[0]).with_name("link")
    link.symlink_to(theirs)
    specs.release()
    assert link.is_symlink()
    assert theirs.is_dir()


def test_temporary_directory_in_use(temporary: Path) -> None:
    """The end of one start leaves another's directory alone; the last one removes it (E-52)."""
    specs = DefaultLogsSpecs()
    specs.reify(envs(1))
    other = specs.reify(envs(1))
    specs.release()
    assert os.path.isdir(os.path.dirname(other.error_files[0]))
    specs.release()
    specs.release()
    assert list(temporary.iterdir()) == []


def test_directory_that_was_swept_away(temporary: Path, tmp_path: Path) -> None:
    """A run whose directory somebody removed starts again in a new one (R-MP-36)."""
    for specs, place in ((DefaultLogsSpecs(), temporary), (DefaultLogsSpecs(tmp_path / "logs"), tmp_path / "logs")):
        specs.reify(envs(1))
        for made in place.iterdir():
            shutil.rmtree(made)
        logs = specs.reify(envs(1, restarts="1"))
        assert os.path.isdir(os.path.dirname(logs.error_files[0]))


def test_given_directory_stays(tmp_path: Path) -> None:
    """A log directory that was asked for is not removed, empty or not (E-52)."""
    specs = DefaultLogsSpecs(tmp_path / "logs")
    logs = specs.reify(envs(1))
    specs.release()
    assert os.path.isdir(os.path.dirname(logs.error_files[0]))


def test_directory_that_cannot_be_made(temporary: Path, tmp_path: Path) -> None:
    """What the file system refuses is an error with its reason, and leaves nothing behind (E-52)."""
    temporary.rmdir()
    temporary.touch()
    error = refused(lambda: DefaultLogsSpecs().reify(envs(1)))
    assert isinstance(error.__cause__, OSError)
    specs = DefaultLogsSpecs(tmp_path / ("x" * 300))
    assert "File name too long" in refused(lambda: specs.reify(envs(1))).why


def test_threads(tmp_path: Path) -> None:
    """Starts from several threads share a run and have an attempt's directory each (R-MP-36)."""
    specs = DefaultLogsSpecs(tmp_path, redirects=Std.OUT)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: specs.reify(envs(2)).stdouts[0], range(32)))
    assert len(set(made)) == 32
    assert len(list(tmp_path.iterdir())) == 1


def test_equality(tmp_path: Path) -> None:
    """Objects with equal arguments are equal, whatever they made (R-MP-36)."""
    make: Callable[..., DefaultLogsSpecs] = DefaultLogsSpecs
    used = make(tmp_path, 3, {0: Std.OUT}, [1, 0])
    used.reify(envs(2))
    assert used == make(str(tmp_path), Std.ALL, {0: 1}, {0, 1})
    assert make() == make()
    for other in (make(tmp_path), make(tmp_path, 3), make(None, 3, {0: 1}, {0, 1}), make(tmp_path, 3, {0: 1}, {0})):
        assert used != other
    assert used != "specs"


def test_repr(tmp_path: Path) -> None:
    """The text names all arguments (R-MP-36)."""
    text = repr(DefaultLogsSpecs(tmp_path, Std.OUT, {0: Std.ERR}, {1}))
    assert text == (
        f"DefaultLogsSpecs(log_dir={str(tmp_path)!r}, redirects=<Std.OUT: 1>, tee={{0: <Std.ERR: 2>}}, "
        "local_ranks_filter={1})"
    )


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda specs: pickle.loads(pickle.dumps(specs))])
def test_copies(tmp_path: Path, copied: Callable[[DefaultLogsSpecs], DefaultLogsSpecs]) -> None:
    """A copy is equal and makes a directory of its own (R-MP-36)."""
    specs = DefaultLogsSpecs(tmp_path, redirects=Std.OUT, local_ranks_filter={0})
    specs.reify(envs(1))
    twin = copied(specs)
    assert twin == specs
    twin.reify(envs(1))
    assert len(list(tmp_path.iterdir())) == 2


class ByRank(LogsSpecs):
    """A plug-in as a user writes it."""

    def reify(self, envs: Mapping[int, Mapping[str, str]]) -> LogsDest:
        return LogsDest(stdouts={rank: f"/logs/{env['RANK']}" for rank, env in envs.items()})

    @property
    def root_log_dir(self) -> str:
        return "/logs"


def test_specs_of_a_user() -> None:
    """A class of one's own sees the environment of each rank, and need not know of ``release`` (R-MP-34)."""
    specs = ByRank(tee=Std.OUT)
    assert specs.reify(envs(2)).stdouts == {0: "/logs/0", 1: "/logs/1"}
    specs.release()
    with pytest.raises(TypeError, match="abstract"):
        LogsSpecs()  # type: ignore[abstract]  # what is tested


@pytest.fixture
def plug_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is installed, with entry points."""
    (tmp_path / "some_logs.py").write_text(
        "from tests.elastic.test_logs import ByRank\nclass Other: pass\nmade = ByRank()\n"
    )
    information = tmp_path / "some_logs-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: some-logs\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[torchrun.logs_specs]\nby_rank = some_logs:ByRank\nother = some_logs:Other\nmade = some_logs:made\n"
        "lacks = some_logs:Lacks\ngone = no_such_module_here:Logs\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("plug_ins")
def test_plug_in() -> None:
    """A class that an installed package registers is found by its name (R-MP-34)."""
    found = load_logs_specs("by_rank")
    assert issubclass(found, LogsSpecs)
    assert found(tee=Std.OUT).root_log_dir == "/logs"


def test_default_specs() -> None:
    """The default is ours, although torch registers its own under that name (R-MP-34)."""
    assert load_logs_specs("default") is DefaultLogsSpecs


@pytest.mark.usefixtures("plug_ins")
def test_unknown_plug_in() -> None:
    """An unknown name is an error that lists those that there are (R-MP-34)."""
    error = refused(lambda: load_logs_specs("by_rnk"))
    assert "'by_rnk'" in error.why
    assert "by_rank, default, gone, lacks, made, other" in error.next


@pytest.mark.usefixtures("plug_ins")
@pytest.mark.parametrize("name", ["other", "made"])
def test_plug_in_of_another_kind(name: str) -> None:
    """What is no class that derives from ours is refused by name (R-MP-34)."""
    assert f"some_logs:{'Other' if name == 'other' else 'made'}" in refused(lambda: load_logs_specs(name)).why


@pytest.mark.usefixtures("plug_ins")
@pytest.mark.parametrize(("name", "cause"), [("lacks", AttributeError), ("gone", ModuleNotFoundError)])
def test_plug_in_that_cannot_be_imported(name: str, cause: type[Exception]) -> None:
    """A plug-in that fails to load is an error with the reason (R-MP-34)."""
    error = refused(lambda: load_logs_specs(name))
    assert isinstance(error.__cause__, cause)
    assert cause.__name__ in error.why
