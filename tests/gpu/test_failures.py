"""What goes wrong on a GPU: an error arrives, nothing hangs, nothing is torn."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from aiockpt.errors import SaveTimeoutError, UsageError
from aiockpt.staging import arena
from tests.gpu.scenes import Scene, busy, guarded, live
from tests.staging.rig import PATIENCE_SECONDS, Rig
from tests.support import run_script

pytestmark = pytest.mark.gpu


def test_memory_that_is_not_pinned(rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Copies go through the driver's own buffers: the call waits, a warning says so, the snapshot is right."""
    monkeypatch.setattr(arena, "pin", lambda address, nbytes, device: "not supported")
    scene = Scene()
    with caplog.at_level(logging.WARNING, "aiockpt"):
        guarded(scene, rig)
    assert "not supported" in caplog.text
    for _ in range(3):
        scene.train()
        expected = live(scene.state)
        busy()
        staging = rig.stage(scene.state)
        scene.train()
        assert staging.wait(PATIENCE_SECONDS), staging.error
        assert rig.staged(scene.state) == expected


def test_a_device_that_is_late(rig: Rig) -> None:
    """Its save fails by ``stall_timeout``; the next one is refused until it has answered, then goes on."""
    rig.stager._stall_timeout = 0.2
    scene = Scene()
    guarded(scene, rig)
    busy(3000)
    staging = rig.stage(scene.state)
    assert not staging.wait(PATIENCE_SECONDS)
    assert isinstance(staging.error, SaveTimeoutError)
    with pytest.raises(UsageError, match="still being copied"):
        rig.stage(scene.state)
    torch.cuda.synchronize()
    expected = live(scene.state)
    rig.save(scene.state)
    assert rig.staged(scene.state) == expected


REFUSED = """
    import torch
    from aiockpt.state.pinned import pin

    here = torch.ones(1000, device="cuda")
    assert pin(4096, 4096, here.device)  # nothing is mapped there
    assert here.add(1).sum().item() == 2000  # and no kernel of this thread hears of it
    print("done")
"""


def test_a_refused_registration_is_no_error_of_the_next_kernel() -> None:
    """CUDA keeps the last error of a thread; it is not left in one that goes on."""
    done = run_script(REFUSED, timeout=PATIENCE_SECONDS * 2)
    assert done.stdout == "done\n", done.stderr


ASSERTED = """
    import sys, time, torch
    from aiockpt import blocking
    from tests.gpu.scenes import Scene, busy

    scene = Scene()
    scene.train()
    checkpointer = blocking.Checkpointer(sys.argv[1], stall_timeout=3.0, close_timeout=20.0)
    checkpointer.open()
    for step in range(2):
        scene.train()
        checkpointer.save(step, scene.state).result()
    scene.train()
    busy(200)
    wrong = torch.full((4,), 7, device="cuda")
    torch.zeros(3, device="cuda")[wrong]  # an assertion on the device, which breaks the context
    began = time.monotonic()
    try:
        save = checkpointer.save(2, scene.state)
        save.result()
    except Exception as exc:
        print(type(exc).__name__, flush=True)
    try:
        checkpointer.close()
    except Exception as exc:
        print(type(exc).__name__, flush=True)
    assert time.monotonic() - began < 30
    print("end", flush=True)
"""


@pytest.mark.process
def test_an_assertion_on_the_device(tmp_path: Path) -> None:
    """The save fails within ``stall_timeout``, ``close`` and the process end; the checkpoints before it stand."""
    from aiockpt import blocking

    done = run_script(ASSERTED, tmp_path / "run", timeout=PATIENCE_SECONDS * 4)
    lines = done.stdout.splitlines()
    assert lines[-1:] == ["end"], (done.stdout, done.stderr)
    assert len(lines) >= 2
    assert blocking.steps(tmp_path / "run") == [0, 1]
    blocking.load(tmp_path / "run")


FORKED = """
    import sys, torch
    from torch.utils.data import DataLoader
    from aiockpt import blocking
    from tests.gpu.scenes import Scene, busy, live

    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, index):
            return torch.tensor(float(index))

    scene = Scene()
    with blocking.Checkpointer(sys.argv[1]) as checkpointer:
        for step in range(4):
            scene.train()
            expected = live(scene.state)
            busy(300)
            save = checkpointer.save(step, scene.state)
            # Forked with copies pending; its workers end by themselves, and drop what they inherited.
            total = sum(batch.sum().item() for batch in DataLoader(Numbers(), batch_size=8, num_workers=2))
            assert total == 64 * 63 / 2, total
            save.result()
        checkpointer.restore(scene.state)
    assert live(scene.state) == expected
    print("end", flush=True)
"""


@pytest.mark.process
def test_a_fork_while_a_save_is_in_flight(tmp_path: Path) -> None:
    """A DataLoader's workers are forked with a context and with copies pending, and are none the worse."""
    done = run_script(FORKED, tmp_path / "run", timeout=PATIENCE_SECONDS * 4)
    assert done.stdout == "end\n", done.stderr


EXITING = """
    import gc, os, sys, torch
    from aiockpt import blocking
    from tests.gpu.scenes import Scene, busy

    def fork():
        # A child drops everything; returns its exit status.
        global scene, checkpointer, save
        pid = os.fork()
        if pid == 0:
            del scene, checkpointer, save
            gc.collect()
            sys.exit(7)  # runs all destructors, unlike a DataLoader's worker
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    scene, checkpointer, save = Scene(), None, None
    scene.train()
    torch.cuda.synchronize()
    if (status := fork()) != 7:
        print("without us", status, flush=True)
        sys.exit()
    checkpointer = blocking.Checkpointer(sys.argv[1])
    checkpointer.open()
    for step in range(3):
        scene.train()
        busy(300)
        save = checkpointer.save(step, scene.state)
        print(fork(), flush=True)
        save.result()
        save = None
        print(fork(), flush=True)
    checkpointer.close()
"""


@pytest.mark.process
def test_a_forked_child_that_drops_everything(tmp_path: Path) -> None:
    """What it inherited is freed without a CUDA call of ours, which would end it."""
    done = run_script(EXITING, tmp_path / "run", timeout=PATIENCE_SECONDS * 4)
    if done.stdout.startswith("without us"):
        pytest.skip(f"needs a torch whose forked children end by themselves: {done.stdout.strip()}")
    assert done.stdout.split() == ["7"] * 6, (done.stdout, done.stderr)


ON_A_DEVICE = """
    import sys, subprocess, torch
    torch.cuda.set_device(1)
    from aiockpt import blocking
    from tests.gpu.scenes import Scene, live

    scene = Scene()
    with blocking.Checkpointer(sys.argv[1]) as checkpointer:
        checkpointer.prepare(scene.state)
        for step in range(3):
            scene.train()
            checkpointer.save(step, scene.state).result()
        checkpointer.restore(scene.state)
    contexts = [torch._C._cuda_hasPrimaryContext(device) for device in range(torch.cuda.device_count())]
    assert contexts[1] and sum(contexts) == 1, contexts
    print("end", flush=True)
"""


@pytest.mark.process
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_first(tmp_path: Path) -> None:
    """No thread of ours makes a context on device 0, which would cost each rank of a host half a GB there."""
    done = run_script(ON_A_DEVICE, tmp_path / "run", timeout=PATIENCE_SECONDS * 4)
    assert done.stdout == "end\n", done.stderr
