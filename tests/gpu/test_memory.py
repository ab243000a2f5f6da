"""What a save in flight holds of the device, and that nothing is given out again under it."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable

import pytest
import torch

from aiockpt.staging.copy_cuda import RUN_NBYTES
from aiockpt.staging.stager import Thresholds
from tests.gpu.scenes import DEVICE, MIB, Scene, busy, guarded, live
from tests.staging.rig import PATIENCE_SECONDS, Rig, raw
from tests.support import run_script

pytestmark = pytest.mark.gpu


def test_what_a_save_takes_of_the_device(make_rig: Callable[..., Rig]) -> None:
    """One run of joined tensors and the canaries at most; afterwards nothing."""
    rig = make_rig(thresholds=Thresholds())
    scene = Scene(width=2048)  # 8 x 16 MiB, three times, and biases of 8 KiB
    guarded(scene, rig)
    scene.optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    busy()
    staging = rig.stage(scene.state)
    peak = torch.cuda.max_memory_allocated() - before
    assert staging.wait(PATIENCE_SECONDS), staging.error
    del staging
    assert peak <= RUN_NBYTES + 4 * MIB
    assert torch.cuda.memory_allocated() <= before


def test_tensors_that_are_dropped_while_they_are_copied(rig: Rig) -> None:
    """Their memory is held until the copy is made: new tensors do not get it."""
    scene = Scene(width=1024)
    guarded(scene, rig)
    state = scene.state
    expected = live(state)
    nbytes = sum(map(len, expected.values()))
    busy(200)
    staging = rig.stage(state)
    assert staging.lazy_nbytes > 0
    held = torch.cuda.memory_allocated()
    shapes = [parameter.shape for parameter in scene.model.parameters()]
    scene.model, scene.optimizer = torch.nn.Sequential(), None  # type: ignore[assignment]
    state.clear()
    gc.collect()
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    fillers = []
    for stream in streams:
        with torch.cuda.stream(stream):
            fillers += [torch.zeros(shape, device=DEVICE) for shape in shapes * 3]
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert rig.plan is not None
    assert rig.arena is not None
    for i, name in enumerate(expected):  # in the order of the entries
        assert raw(rig.arena.bytes_at(rig.plan.offsets[i], rig.plan.sizes[i])) == expected[name], name
    del fillers, staging
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= held - nbytes * 0.9


def test_memory_is_released(rig: Rig) -> None:
    """Nothing of the device stays held after the copies."""
    tensors = {"t": {"w": torch.randn(16 * MIB, device=DEVICE)}}
    rig.save(tensors)
    before = torch.cuda.memory_allocated()
    rig.save(tensors)
    assert torch.cuda.memory_allocated() <= before


WITHOUT_MEMORY = """
    import sys, torch, logging
    from tests.gpu.scenes import DEVICE, MIB, live
    from tests.staging.rig import Rig, PATIENCE_SECONDS
    from aiockpt.staging.stager import Thresholds
    from aiockpt.errors import StorageError

    small = {str(i): torch.randn(MIB // 8, device=DEVICE) for i in range(200)}
    strided = torch.randn(4096, 4096, device=DEVICE).t()
    rig = Rig(thresholds=Thresholds())
    rig.save({"t": small})
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    used = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((used + (1 << 20)) / total)
    for _ in range(2):
        rig.save({"t": small})
        assert rig.staged({"t": small}) == live({"t": small})
    try:
        rig.save({"t": {"strided": strided}})
    except StorageError as exc:
        assert "no memory left" in str(exc), exc
    else:
        raise AssertionError("the strided tensor was copied without memory")
    torch.cuda.set_per_process_memory_fraction(1.0)
    rig.save({"t": {"strided": strided}})
    assert rig.staged({"t": {"strided": strided}}) == live({"t": {"strided": strided}})
    rig.close()
    print("done")
"""


def test_a_device_that_is_full() -> None:
    """Small tensors are copied one by one; a strided one that cannot be made contiguous fails its save alone."""
    done = run_script(WITHOUT_MEMORY, timeout=PATIENCE_SECONDS * 4)
    assert done.stdout == "done\n", done.stderr


ALLOCATOR = """
    import json, os, sys
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = os.environ["PYTORCH_ALLOC_CONF"] = sys.argv[1]
    import torch
    from tests.gpu.scenes import Scene, busy, guarded, live
    from tests.staging.rig import Rig, PATIENCE_SECONDS

    rig = Rig()
    scene = Scene(width=1024, foreach=True)
    guarded(scene, rig)
    same = []
    for _ in range(3):
        scene.train()
        expected = live(scene.state)
        busy()
        staging = rig.stage(scene.state)
        scene.train()
        assert staging.wait(PATIENCE_SECONDS), staging.error
        same.append(rig.staged(scene.state) == expected)
    rig.close()
    print(json.dumps(same))
"""


@pytest.mark.parametrize("setting", ["expandable_segments:True", "backend:cudaMallocAsync"])
def test_other_allocators(setting: str) -> None:
    """Segments that grow, and CUDA's own pool."""
    done = run_script(ALLOCATOR, setting, timeout=PATIENCE_SECONDS * 4)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [True, True, True]
