"""``aiockpt spawn`` as a shell sees it: what trainers find, its status, its report, its signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from aiockpt import blocking
from tests.elastic.supervised import pids_in
from tests.support import ROOT, is_alive
from tests.waiting import PATIENCE_SECONDS, wait_until

pytestmark = pytest.mark.process

NAMES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
    *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "AIOCKPT_PHYSICAL_LOCAL_RANK"),
)
SAY = f"""
import json, os, sys
line = json.dumps([{{name: os.environ[name] for name in {NAMES} if name in os.environ}}, sys.argv[1:]]) + "\\n"
os.write(1, line.encode())
"""
"""Says what a trainer has found, in one write: the other's line may come at any time."""
WITHOUT_TORCH = (
    "import sys; sys.modules['torch'] = sys.modules['numpy'] = None; "
    "from aiockpt.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


def line_of(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", WITHOUT_TORCH, "spawn", *map(str, arguments)]


def environment(more: dict[str, str]) -> dict[str, str]:
    ours = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    }
    return {**ours, "PYTHONPATH": str(ROOT), **more}


def spawn(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end, without torch in its reach."""
    return subprocess.run(
        line_of(*arguments),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env=environment(more),
        check=False,
    )


@contextlib.contextmanager
def spawned(*arguments: str | Path, **more: str) -> Iterator[subprocess.Popen[str]]:
    """Run it while something is done to it."""
    process = subprocess.Popen(
        line_of(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(more)
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def said(done: subprocess.CompletedProcess[str]) -> dict[int, tuple[dict[str, str], list[str]]]:
    """Return what ``SAY`` said, by rank on this host."""
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {int(env["AIOCKPT_PHYSICAL_LOCAL_RANK"]): (env, arguments) for env, arguments in found}


def a_tree(file: Path, stubborn: str = "") -> list[str]:
    """A shell with a child in another session, both long-lived; ``file`` gets their pids."""
    script = f"{stubborn} setsid sleep 1000 & echo $! $BASHPID >> {file}; wait; sleep 1000"
    return ["bash", "-c", script]


# -- what trainers find -----------------------------------------------------------------------------------------------


def test_variables_and_arguments() -> None:
    """Each rank finds its own, with its rank in the arguments, and one OpenMP thread (R-MP-44, R-MP-45, R-MP-46)."""
    found = said(spawn("-n", "2", "--", sys.executable, "-c", SAY, "--device=cuda:${local_rank}", "-n", "${other}"))
    assert sorted(found) == [0, 1]
    for rank, (env, arguments) in found.items():
        assert arguments == [f"--device=cuda:{rank}", "-n", "${other}"]
        ours = {name: env[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "MASTER_ADDR")}
        ours["device"] = env.get("CUDA_VISIBLE_DEVICES", "all")
        assert ours == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "device": "all",
        }
    assert found[0][0]["MASTER_PORT"] == found[1][0]["MASTER_PORT"]
    assert found[0][0]["TORCHELASTIC_RUN_ID"] == found[1][0]["TORCHELASTIC_RUN_ID"] != ""


@pytest.mark.parametrize(("nprocs", "given", "expected"), [("2", "7", "7"), ("1", None, None)])
def test_threads_of_openmp(nprocs: str, given: str | None, expected: str | None) -> None:
    """What was set stays, and a single trainer has the host for itself (R-MP-46)."""
    found = said(spawn("-n", nprocs, sys.executable, "-c", SAY, **({"OMP_NUM_THREADS": given} if given else {})))
    assert {env.get("OMP_NUM_THREADS") for env, _ in found.values()} == {expected}


@pytest.mark.parametrize(("visible", "devices"), [(None, ["0", "1"]), ("5,GPU-77ab", ["5", "GPU-77ab"])])
def test_virtual_local_rank(visible: str | None, devices: list[str]) -> None:
    """Each trainer sees its own GPU as the first, and ``${local_rank}`` is the true rank still (R-MP-44, R-MP-45)."""
    more = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    found = said(spawn("-n", "2", "--virtual-local-rank", "--", sys.executable, "-c", SAY, "${local_rank}", **more))
    assert {env["LOCAL_RANK"] for env, _ in found.values()} == {"0"}
    assert [found[rank][0]["CUDA_VISIBLE_DEVICES"] for rank in (0, 1)] == devices
    assert [found[rank][1] for rank in (0, 1)] == [["0"], ["1"]]


def test_names() -> None:
    """The run's and the role's are as given."""
    found = said(spawn("-n", "1", "--run-id", "a/b", "--name", "tuner", "--", sys.executable, "-c", SAY))
    assert [found[0][0][name] for name in ("TORCHELASTIC_RUN_ID", "ROLE_NAME")] == ["a/b", "tuner"]


# -- output -----------------------------------------------------------------------------------------------------------


def test_logs(tmp_path: Path) -> None:
    """Files by rank, chosen ranks on the console, chosen lines in one; it says where (R-MP-36, R-MP-39, R-MP-41)."""
    script = "echo step ${local_rank}; echo loss ${local_rank}; echo odd >&2"
    options = ["--log-dir", tmp_path / "logs", "--run-id", "exp/1", "--tee", "0:1,1:1", "--redirects", "2"]
    done = spawn("-n", "2", *options, "--local-ranks-filter", "1", "--filter-stdout", "loss", "--", "sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, "[trainer1]:step 1\n[trainer1]:loss 1\n")
    (run,) = (tmp_path / "logs").iterdir()
    assert run.name.startswith("exp_1_")
    attempt = run / "attempt_0"
    assert done.stderr == f"aiockpt: logs in {attempt}\n"
    assert (attempt / "0" / "stdout.log").read_text() == "step 0\nloss 0\n"
    assert (attempt / "1" / "stderr.log").read_text() == "odd\n"
    assert (attempt / "filtered_stdout.log").read_text() == "[trainer1]:loss 1\n"


def test_a_console_without_files(tmp_path: Path) -> None:
    """Prefixes need no log files; without options output is as it is, and no directory is left (E-52, R-MP-40)."""
    more = {"TMPDIR": str(tmp_path)}
    done = spawn("-n", "1", "--tee", "3", "--log-dir", "/dev/null", "--", "sh", "-c", "echo a; echo b >&2", **more)
    assert (done.stdout, done.stderr) == ("[trainer0]:a\n", "[trainer0]:b\n")
    done = spawn("-n", "1", "--", "sh", "-c", "echo a; echo b >&2; cat", **more)
    assert (done.stdout, done.stderr) == ("a\n", "b\n")
    assert list(tmp_path.iterdir()) == []


LISTENS = """
import os, signal, subprocess, sys
signum = signal.Signals(int(sys.argv[1]))
signal.pthread_sigmask(signal.SIG_BLOCK, [signum])
other = subprocess.Popen(["sleep", "1000"], start_new_session=True)
with open(sys.argv[2], "a") as file:
    file.write(f"{other.pid} {os.getpid()}\\n")
got = signal.sigwait([signum]).name
os.write(1, f"got {got}\\n".encode())  # in one write: the other's may come in between
"""
"""A trainer that ends by itself when it is told, and leaves something behind."""


# -- how it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "status", "told"),
    [("exit 3", 3, "exitcode  : 3"), ("kill -9 $BASHPID", 137, "SIGKILL"), ("kill -SEGV $BASHPID", 139, "SIGSEGV")],
)
def test_the_status_is_that_of_the_root_cause(tmp_path: Path, end: str, status: int, told: str) -> None:
    """The others are stopped with all that they started, and the report names the rank and its last words (R-ER-16)."""
    file = tmp_path / "pids"
    script = f'if [ $RANK = 1 ]; then while [ ! -s {file} ]; do sleep 0.01; done; echo "no such layer" >&2; {end}; fi; '
    done = spawn("-n", "2", "--redirects", "3", "--log-dir", tmp_path, "--", "bash", "-c", script + a_tree(file)[2])
    assert done.returncode == status
    assert done.stdout == ""
    assert "trainer FAILED" in done.stderr
    root = done.stderr[done.stderr.index("Root Cause") :]
    assert told in root
    assert "rank      : 1 (local_rank: 1)" in root
    assert "no such layer" in root
    assert [pid for pid in pids_in(file) if is_alive(pid)] == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_ends_all_by_that_signal(tmp_path: Path, signum: signal.Signals) -> None:
    """Trainers get the very signal, and who waits for the command sees that it ended by it (E-39, R-MP-28)."""
    file = tmp_path / "pids"
    with spawned("-n", "2", "--", sys.executable, "-c", LISTENS, str(signum.value), file) as process:
        wait_until(lambda: len(pids_in(file)) == 4, "both trainers")
        process.send_signal(signum)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == -signum
    assert out.splitlines() == [f"got {signum.name}"] * 2
    assert "Traceback" not in err
    assert [pid for pid in pids_in(file) if is_alive(pid)] == []


def test_stop_timeout_is_for_all_of_a_stop(tmp_path: Path) -> None:
    """A trainer that does not hear is killed within it, and the command still ends by the signal (R-MP-21, R-MP-22)."""
    file = tmp_path / "pids"
    with spawned("-n", "1", "--stop-timeout", "0.5", "--", *a_tree(file, "trap '' TERM;")) as process:
        wait_until(lambda: len(pids_in(file)) == 2, "the trainer")
        asked = time.monotonic()
        process.terminate()
        process.communicate(timeout=PATIENCE_SECONDS)
        assert time.monotonic() - asked < 10  # 30 is the default
    assert process.returncode == -signal.SIGTERM
    assert [pid for pid in pids_in(file) if is_alive(pid)] == []


def test_nothing_outlives_a_killed_command(tmp_path: Path) -> None:
    """A SIGKILL to it ends trainers and what they started within a second (E-36, R-MP-25)."""
    file = tmp_path / "pids"
    with spawned("-n", "2", "--", *a_tree(file)) as process:
        wait_until(lambda: len(pids_in(file)) == 4, "both trainers")
        process.kill()
        process.wait()
        wait_until(lambda: not any(map(is_alive, pids_in(file))), "the end of all", timeout=5)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "-n/--nprocs"),
        (("-n", "2"), "no program is named"),
        (("-n", "2", "--"), "no program is named"),
        (("-n", "0", "--", "true"), "at least 1"),
        (("-n", "gpu", "--", "true"), "no GPU is seen"),
        (("-n", "2", "--", "{tmp}/none"), "there is no such file"),
        (("-n", "2", "--", "{tmp}/file"), "no permission to be executed"),
        (("-n", "2", "--tee", "4", "--", "true"), "--tee was refused"),
        (("-n", "2", "--redirects", "0:1,0:2", "--", "true"), "rank 0 is named twice"),
        (("-n", "2", "--redirects", "2:1", "--", "true"), "it names rank 2"),
        (("-n", "2", "--redirects", "3", "--log-dir", "/dev/null", "--", "true"), "makes no files"),
        (("-n", "2", "--log-dir", "{tmp}/file", "--", "true"), "is not a directory"),
        (("-n", "2", "--log-dir", "/proc/none", "--", "true"), "no directory can be made"),
        (("-n", "2", "--filter-stderr", "x", "--tee", "1", "--", "true"), "give --tee 2"),
        (("-n", "2", "--local-ranks-filter", "0,x", "--", "true"), "does not name ranks"),
        (("-n", "2", "--local-ranks-filter", "2", "--", "true"), "it names rank 2"),
        (("-n", "2", "--stop-timeout", "soon", "--", "true"), "invalid float"),
        (("-n", "2", "--stop-timeout", "nan", "--", "true"), "is not a number of seconds"),
        (("-n", "2", "--numa-binding", "near", "--", "true"), "invalid choice"),
        (("-n", "2", "--virtual-local-rank", "--", "true"), "names only 1 device"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path: Path, arguments: Sequence[str], told: str) -> None:
    """Whatever is wrong with what was typed, and nothing was started."""
    (tmp_path / "file").write_text("x")
    done = spawn(*(part.format(tmp=tmp_path) for part in arguments), CUDA_VISIBLE_DEVICES="0", TMPDIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# -- jobs -------------------------------------------------------------------------------------------------------------

GLOO_JOB = """
import sys
import torch
import torch.distributed as dist
import aiockpt

dist.init_process_group("gloo")
total = torch.tensor(float(dist.get_rank() + 1))
dist.all_reduce(total)
with aiockpt.blocking.Checkpointer(sys.argv[1]) as ckpt:
    ckpt.save(7, {"total": total}).result()
dist.destroy_process_group()
"""


def test_a_job_of_torch_distributed(tmp_path: Path) -> None:
    """Two ranks of gloo meet at the port that was held for them, and save one checkpoint (R-MP-44)."""
    script = tmp_path / "job.py"
    script.write_text(GLOO_JOB)
    done = spawn(
        "-n", "2", "--tee", "3", "--log-dir", tmp_path / "logs", "--", sys.executable, script, tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr
    assert blocking.load(tmp_path / "run")["total"].item() == 3.0
    assert blocking.steps(tmp_path / "run") == [7]


MEETING = """
import os, socket, time
port, run_id = int(os.environ["MASTER_PORT"]), os.environ["TORCHELASTIC_RUN_ID"]
if os.environ["RANK"] == "0":
    kind, place = (socket.AF_INET6, "::") if socket.has_dualstack_ipv6() else (socket.AF_INET, "")
    store = socket.socket(kind)
    store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if kind == socket.AF_INET6:
        store.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    store.bind((place, port))
    store.listen()
    store.accept()[0].sendall(run_id.encode())
else:
    while True:
        try:
            peer = socket.create_connection((os.environ["MASTER_ADDR"], port))
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
    met = peer.makefile().read()
    assert met == run_id, f"met {met}"
    print(port, flush=True)
"""
"""Two ranks meet as they do at torch's store, whose import would take this test half a minute."""


def test_ten_jobs_at_once() -> None:
    """Each has a port of its own, though all look for one at the same time, and nobody meets a stranger (R-MP-44)."""
    with contextlib.ExitStack() as jobs:
        processes = [
            jobs.enter_context(spawned("-n", "2", "--run-id", f"job-{index}", "--", sys.executable, "-c", MEETING))
            for index in range(10)
        ]
        ends = [(*process.communicate(timeout=PATIENCE_SECONDS), process.returncode) for process in processes]
    assert [status for _, _, status in ends] == [0] * 10, ends
    assert len({out for out, _, _ in ends}) == 10
