"""All of it on the device: a trainer that is killed in mid-save and resumes bit for bit; the demo."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import aiockpt
from aiockpt import blocking
from tests.gpu.scenes import DEVICE, Scene, guarded, live
from tests.staging.rig import Rig
from tests.support import ROOT, attempts, python_path, run_script, start_script, wait_until

pytestmark = [pytest.mark.gpu, pytest.mark.process]

TRAINER = """
    import os, sys
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    import torch
    from torch import nn
    import aiockpt
    from aiockpt import blocking

    run, device, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(2048, 2048), nn.GELU(), nn.Dropout(0.1))]
    model = nn.Sequential(*layers, nn.BatchNorm1d(2048)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "rng": aiockpt.RNG()}
    with blocking.Checkpointer(run, keep=aiockpt.Latest(2)) as checkpointer:
        resumed = checkpointer.restore(state)
        checkpointer.prepare(state)
        for step in range(resumed.step + 1 if resumed else 0, steps):
            loss = model(torch.randn(32, 2048, device=device)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            print(step, loss.item().hex(), flush=True)
            if step % 3 == 2:
                checkpointer.save(step, state)
                print("saving", step, flush=True)
    digest = sum(tensor.double().sum().item() for tensor in model.state_dict().values())
    print("end", digest.hex(), flush=True)
"""


def losses(text: str) -> dict[str, str]:
    """Return the second word of each line by its first."""
    return dict(line.split() for line in text.splitlines() if not line.startswith("saving"))


def test_killed_in_a_save_and_resumed(tmp_path: Path) -> None:
    """Every loss after the restart, and the end, are those of a trainer that nobody killed."""
    reference = run_script(TRAINER, tmp_path / "reference", DEVICE, 14, timeout=200)
    assert reference.returncode == 0, reference.stderr
    expected = losses(reference.stdout)
    run = tmp_path / "run"
    killed = start_script(TRAINER, run, DEVICE, 14)
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.startswith("saving 8"):
            break
    wait_until(lambda: attempts(run) or blocking.steps(run)[-1] == 8, "the save of step 8")
    killed.kill()
    _, errors = killed.communicate(timeout=60)
    assert killed.returncode < 0, errors
    resumed = run_script(TRAINER, run, DEVICE, 14, timeout=200)
    assert resumed.returncode == 0, resumed.stderr
    found = losses(resumed.stdout)
    assert min(int(step) for step in found if step != "end") in (6, 9)
    assert found == {key: expected[key] for key in found}


def test_the_demo(tmp_path: Path) -> None:
    """Killed in the middle of a save, resumed, equal bit for bit."""
    if importlib.util.find_spec("rich") is None:
        pytest.skip("needs rich: the demo draws its screen with it")
    command = [sys.executable, "-m", "aiockpt.cli", "demo", "--size", "tiny", "--steps", "12", "--device", DEVICE]
    done = subprocess.run(
        [*command, "--dir", tmp_path],
        env=os.environ | {"PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=220,
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "All 12 losses" in done.stdout


def test_a_worker_that_dies_while_the_device_copies(tmp_path: Path) -> None:
    """The save is retried from the arena, which stays pinned."""
    scene = Scene()
    with blocking.Checkpointer(tmp_path / "run") as checkpointer:
        for step in range(4):
            scene.train()
            expected = live(scene.state)
            save = checkpointer.save(step, scene.state)
            if step == 2:
                pid = checkpointer.statistics().worker_pid
                assert pid is not None
                os.kill(pid, 9)
            save.result()
            scene.train()
            loaded = blocking.load(tmp_path / "run", step=step)
            assert live({"model": loaded["model"]}) == {
                name: value for name, value in expected.items() if name.startswith("model.")
            }


def test_the_default_device_is_none_of_ours(tmp_path: Path, rig: Rig) -> None:
    """What the library makes on the CPU stays there under ``torch.set_default_device("cuda")``."""
    torch.set_default_device(DEVICE)
    try:
        scene = Scene()
        guarded(scene, rig)
        state: dict[str, Any] = {**scene.state, "rng": aiockpt.RNG(), "blob": {"x": b"abc" * 5000}}
        with blocking.Checkpointer(tmp_path / "run") as checkpointer:
            for step in range(3):
                scene.train()
                expected = live(scene.state)
                checkpointer.save(step, state).result()
            scene.train()
            checkpointer.restore(state)
            assert live(scene.state) == expected
        loaded = blocking.load(tmp_path / "run")
        assert not loaded["model"]["0.weight"].is_cuda
        assert loaded["blob"]["x"] == b"abc" * 5000
    finally:
        torch.set_default_device(None)


def test_statistics_say_that_it_is_pinned(tmp_path: Path) -> None:
    """A state on the device has a pinned arena, a state on the CPU has none."""
    scene = Scene()
    scene.train()
    for state, is_pinned in ((scene.state, True), ({"t": {"x": torch.randn(100_000)}}, False)):
        with blocking.Checkpointer(tmp_path / str(is_pinned)) as checkpointer:
            checkpointer.prepare(state)
            assert checkpointer.statistics().arena_pinned is is_pinned


BENCH = ("bench", "gpu", "--size", "64MiB", "--rounds", "2", "--steps", "4", "--step-ms", "20", "--peers", "none")


def test_the_benchmark(tmp_path: Path) -> None:
    """``python -m bench gpu`` measures ours beside the floor of pinned copies."""
    report = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "-m", *BENCH, "--dir", tmp_path, "--json", report, "--device", DEVICE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=220,
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    content = json.loads(report.read_text())
    assert [row["case"] for row in content["rows"]] == ["guarded", "inline"]
    for row in content["rows"]:
        assert 0 < row["blocked_s"] <= row["staged_s"] <= row["durable_s"]
        assert row["copy_gbps"] > 0
        assert row["step_ratio_median"] > 0
