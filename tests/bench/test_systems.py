"""Each system saves what the benchmark thinks it saves, and gives it back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.entrant import Restorer, Saver, timed_save, tree_nbytes
from bench.entrants import RESTORES, SAVES, Entry, Key, load_class
from bench.process import EntrantProcess
from bench.state import make_state

pytestmark = [
    pytest.mark.process,
    # DCP says so of every save and load without a process group.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized"),
]

STATE_NBYTES = 1 << 20
APART = ("dcp.async_save process", "torch_checkpointing", "torchsnapshot")
"""Leave processes, threads or event loops to the end of theirs: in a process of their own here too."""
EXTRAS = {"torch_checkpointing": "torch_checkpointing", "torchsnapshot": "torchsnapshot", "safetensors": "safetensors"}


def entries(table: dict[Key, Entry]) -> list[object]:
    return [pytest.param(key, entry, id=f"{key.system}-{key.case}") for key, entry in table.items()]


def need(key: Key) -> None:
    if key.system in EXTRAS:
        pytest.importorskip(EXTRAS[key.system])


@pytest.mark.parametrize(("key", "entry"), entries({k: e for k, e in SAVES.items() if k.system not in APART}))
def test_a_saver_writes_the_whole_state_and_removes_it(key: Key, entry: Entry, tmp_path: Path) -> None:
    """As many bytes as the state has; the times are in order; nothing of a discarded step stays."""
    need(key)
    saver: Saver = load_class(entry.place)(make_state(entry.state, STATE_NBYTES), tmp_path)
    saver.open()
    for step in (1, 2):
        saver.state.train_step()
        saver.make_ready(step)
        times = timed_save(saver, step)
        assert 0 < times.blocked_s <= times.staged_s <= times.durable_s
        assert tree_nbytes(saver.path(step)) >= saver.state.nbytes
        saver.discard(step)
        saver.settle()
    written = tree_nbytes(tmp_path)
    assert written < 2 * saver.state.nbytes, "retention keeps one at most"
    saver.close()


@pytest.mark.parametrize(("key", "entry"), entries({k: e for k, e in SAVES.items() if k.system in APART}))
def test_a_saver_in_a_process_of_its_own(key: Key, entry: Entry, tmp_path: Path) -> None:
    """The same through the process that the benchmark runs it in."""
    need(key)
    arguments = {"place": entry.place, "role": "save", "state": "gpt", "size": STATE_NBYTES, "dir": tmp_path}
    with EntrantProcess(arguments) as process:
        assert process.answer()["nbytes"] > STATE_NBYTES * 0.9
        times = process.ask("round")
        assert 0 < times["blocked_s"] <= times["durable_s"]
        assert tree_nbytes(tmp_path / "step-1") > STATE_NBYTES * 0.9
        process.ask("discard")
        assert not (tmp_path / "step-1").exists()
        process.close()


@pytest.mark.parametrize(("key", "entry"), entries({k: e for k, e in RESTORES.items() if k.system not in APART}))
def test_a_restorer_reads_what_it_wrote(key: Key, entry: Entry, tmp_path: Path) -> None:
    """Those that restore in place bring every tensor of the live state back."""
    need(key)
    state = make_state(entry.state, STATE_NBYTES)
    restorer: Restorer = load_class(entry.place)(state, tmp_path)
    path = restorer.write()
    assert tree_nbytes(path) >= state.nbytes
    saved = {name: tensor.clone() for name, tensor in state.tensors().items()}
    state.train_step()
    restorer.restore(path)
    if "in place" in key.case:
        assert [name for name, tensor in state.tensors().items() if not torch.equal(tensor, saved[name])] == []


@pytest.mark.parametrize(("key", "entry"), entries({k: e for k, e in RESTORES.items() if k.system in APART}))
def test_a_restorer_in_a_process_of_its_own(key: Key, entry: Entry, tmp_path: Path) -> None:
    """It says where its files are, whose reading is its floor."""
    need(key)
    arguments = {"place": entry.place, "role": "restore", "state": "gpt", "size": STATE_NBYTES, "dir": tmp_path}
    with EntrantProcess(arguments) as process:
        opened = process.answer()
        assert tree_nbytes(Path(opened["path"])) == opened["nbytes"] > STATE_NBYTES * 0.9
        assert process.ask("round")["blocked_s"] > 0
        process.close()
