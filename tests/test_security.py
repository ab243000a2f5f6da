"""What docs/security.md promises of all code at once: no pickle in checkpoints, no network, the user's umask."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT, run_script

EXECUTE = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy"}
CALLS = {"eval", "exec", "compile", "__import__"}


BETWEEN_OUR_OWN_PROCESSES = {"elastic/launching/child.py", "elastic/launching/functions.py"}
"""A function, its arguments and its value travel over a socket that no other process has."""


def test_no_module_executes_what_it_reads() -> None:
    """None imports what does, and torch's loader is called only as the one that does not."""
    package = ROOT / "aiockpt"
    found = {
        f"{path.relative_to(package)}": what
        for path in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if (what := executes(node))
    }
    assert found == dict.fromkeys(BETWEEN_OUR_OWN_PROCESSES, "pickle")


def executes(node: ast.AST) -> str | None:
    """Return what a piece of code may execute of what it reads; None where it executes nothing."""
    names: set[str] = set()
    if isinstance(node, ast.Import):
        names = {alias.name.partition(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
        names = {(node.module or "").partition(".")[0]}
    elif isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        safe = any(keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in node.keywords)
        return name if name in CALLS or (name == "torch.load" and not safe) else None
    return ", ".join(names & EXECUTE) or None


SAVE_AND_READ = """
    import os, sys
    import torch, aiockpt
    from aiockpt import blocking

    os.umask(0o077)
    FORBIDDEN = ("pickle.find_class", "socket.bind", "socket.connect", "socket.sendto", "socket.getaddrinfo")

    def audit(event, arguments):
        if event in FORBIDDEN:
            os.write(2, f"{event} {arguments}\\n".encode())
            os._exit(1)

    run = sys.argv[1]
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "rng": aiockpt.RNG(), "values": {"path": run, "n": (1, {2})}}
    sys.addaudithook(audit)
    with blocking.Checkpointer(run) as ckpt:
        ckpt.save(0, state, metadata={"why": "a test"})
        ckpt.restore(state)
        ckpt.verify(0)
    blocking.load(run)
    blocking.load(run, mmap=True)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run that was saved, restored and loaded under the hook and a narrow umask."""
    run = tmp_path_factory.mktemp("security") / "run"
    return run, run_script(SAVE_AND_READ, run)


def test_a_save_and_its_way_back_unpickle_nothing_and_call_nobody(
    saved: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """Under a hook of the interpreter that ends the process where one of these begins."""
    _, done = saved
    assert (done.returncode, done.stderr) == (0, "")


def test_the_umask_decides_who_may_read(saved: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Every file and directory of a run, those that the worker makes too."""
    run, _ = saved
    made = [run, *run.rglob("*")]
    assert len(made) > 10
    assert {oct(path.stat().st_mode & 0o777) for path in made if path.is_dir()} == {"0o700"}
    assert {oct(path.stat().st_mode & 0o777) for path in made if path.is_file()} == {"0o600"}
