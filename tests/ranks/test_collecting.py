"""What real ranks collect of modules that torch has spread over them, and what each of them stages of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks.conftest import Start
from tests.ranks.job import Job

pytestmark = pytest.mark.process

COMMON = """
    import collections
    import pathlib
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.nn.parallel import DistributedDataParallel as DDP
    from aiockpt.format.names import dotted
    from aiockpt.planning.placings import PER_RANK, UNDECLARED, only_of, replicated
    from aiockpt.planning.local import plan_local
    from aiockpt.planning.sharding import Cut, Sharding
    from aiockpt.state.collect import collect
    from aiockpt.state.expected import expected_entries
    from aiockpt.state.ranks import Ranks
    from tests.planning.job import merged
    from tests.restoring.ranked import save_together
    from tests.restoring.restoring import restore
    run = pathlib.Path(args[0])
    RANKS = Ranks(rank, world, tuple(range(world)))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(12)
            self.up = nn.Linear(12, 20)
            self.down = nn.Linear(20, 12)
        def forward(self, x):
            return x + self.down(torch.relu(self.up(self.norm(x))))

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(30, 12)
            self.blocks = nn.ModuleList([Block(), Block()])
            self.head = nn.Linear(12, 30, bias=False)
            self.register_buffer("mask", torch.ones(4, 4).tril())
        def forward(self, x):
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    def train(model, optimizer, steps=2):
        for step in range(steps):
            torch.manual_seed(100 + step)
            model(torch.randint(0, 30, (2, 4))).float().logsumexp(-1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def plans_of(state, **options):
        collected = collect(state, ranks=RANKS, **options)
        plan = plan_local(collected.entries, collected.tree, {}, rank=rank, world=world)
        plans = [None] * world
        dist.all_gather_object(plans, plan)
        return collected, plan, plans

    def placings(collected):
        return {dotted(entry.segments): entry.placing for entry in collected.entries}

    def full(tensor):
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def check_refused(state, key, *words, ranks=RANKS):
        try:
            collect(state, ranks=ranks)
        except aiockpt.UnsupportedValueError as exc:
            assert exc.key == key and all(word in str(exc) for word in words), exc
        else:
            raise AssertionError("it was taken")
"""


def check(start: Start, code: str, run: Path | str = "") -> Job:
    """Run a job of four ranks, each of which must succeed."""
    job = start(4, COMMON + code, run)
    job.check()
    return job


ROUND_TRIP = """
    def make():
        model = Transformer()
        SHARD
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    model, optimizer = make()
    before = collect({"model": model, "optimizer": optimizer}, ranks=RANKS)
    expected = {entry for entry in expected_entries(before)}
    train(model, optimizer)
    state = {"model": model, "optimizer": optimizer}
    collected, plan, plans = plans_of(state)
    merged(plans)
    assert len({one.digest for one in plans}) == 1
    found = {entry for entry in collected.entries if entry.segments[0] == "optimizer"}
    assert expected == found, expected ^ found
    held = sum(tensor.nbytes for tensor in collected.tensors)
    assert plan.data_nbytes <= held
    again = collect(state, ranks=RANKS)
    assert all(one.placing is two.placing for one, two in zip(collected.entries, again.entries))
    save_together(run, state)
    other, fresh = make()
    with torch.no_grad():
        for param in other.parameters():
            param.zero_()
    restore(run, {"model": other, "optimizer": fresh}, rank=rank)
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(full(one), full(two)), name
    train(model, optimizer)
    train(other, fresh)
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(full(one), full(two)), name
    if rank == 0:
        print(sum(1 for entry in collected.entries if entry.placing is UNDECLARED))
"""

FSDP = """mesh = init_device_mesh("cpu", (world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)"""
HSDP = FSDP.replace("(world,)", '(2, world // 2), mesh_dim_names=("replicate", "shard")')
FSDP_TP = """mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        for block in model.blocks:
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])"""
DDP_WRAPPED = "model = DDP(model)"


@pytest.mark.parametrize(
    ("shard", "undeclared"),
    # "step" is a plain tensor beside a DTensor, the mask a plain buffer
    [(FSDP, 15), (HSDP, 15), (FSDP_TP, 15), (DDP_WRAPPED, 0)],
    ids=["fsdp2", "hsdp", "fsdp2 over tp", "ddp"],
)
def test_a_trained_transformer_comes_back(start: Start, tmp_path: Path, shard: str, undeclared: int) -> None:
    """And trains on bit for bit; memory was made for what its optimizer would have."""
    job = check(start, ROUND_TRIP.replace("SHARD", shard), tmp_path / "run")
    assert job.out(0) == [str(undeclared)]


def test_ddp_stages_each_tensor_on_one_rank(start: Start, tmp_path: Path) -> None:
    """At most the mean and the largest tensor; running statistics, which differ, are those of rank 0."""
    check(
        start,
        """
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(48, 5))
    model = DDP(inner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(3):
        torch.manual_seed(10 * rank + step)
        model(torch.randn(4, 3, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    collected, plan, plans = plans_of({"model": model, "optimizer": optimizer})
    found = placings(collected)
    statistics = {name for name in found if "running" in name or "num_batches" in name}
    assert {name for name, placing in found.items() if placing == only_of(0)} == statistics
    assert {name for name, placing in found.items() if placing == replicated(4)} == found.keys() - statistics
    merged(plans)
    declared = {i for i, entry in enumerate(collected.entries) if entry.placing == replicated(4)}
    sizes = [collected.tensors[i].nbytes for i in declared]
    mine = sum(size for part, size in zip(plan.parts, plan.sizes) if part.entry in declared)
    assert mine <= sum(sizes) / 4 + max(sizes)
    staged = sorted(dotted(collected.entries[part.entry].segments) for part in plan.parts)
    everything = [None] * world
    dist.all_gather_object(everything, staged)
    assert sorted(name for names in everything for name in names) == sorted(found)
    assert statistics <= set(everything[0])
    means = [torch.zeros(8) for _ in range(world)]
    dist.all_gather(means, inner[1].running_mean)
    assert not torch.equal(means[0], means[1])

    save_together(run, {"model": model, "optimizer": optimizer})
    restore(run, {"model": model, "optimizer": optimizer}, rank=rank)
    assert torch.equal(inner[1].running_mean, means[0])
    """,
        tmp_path / "run",
    )


def test_what_ddp_does_not_keep_equal_is_not_declared(start: Start) -> None:
    """Ignored names, buffers that it does not broadcast, what stands beside it; a subgroup of its own."""
    check(
        start,
        """
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.free = nn.Linear(2, 2)
            inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
            DDP._set_params_and_buffers_to_ignore_for_model(inner, ["0.bias", "1.running_var"])
            self.wrapped = DDP(inner)
    model = Outer()
    found = placings(collect({"m": model}, ranks=RANKS))
    assert {name: placing for name, placing in found.items() if placing is UNDECLARED}.keys() == {
        "m.free.weight", "m.free.bias", "m.wrapped.0.bias", "m.wrapped.1.running_var"}, found
    quiet = DDP(nn.BatchNorm1d(2), broadcast_buffers=False)
    found = placings(collect({"m": quiet}, ranks=RANKS))
    assert found["m.weight"] == replicated(4) and found["m.running_mean"] is UNDECLARED
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    half = DDP(nn.BatchNorm1d(2), process_group=groups[rank % 2])
    found = placings(collect({"m": half}, ranks=RANKS))
    assert found["m.weight"] == Sharding((2,), (rank % 2, rank % 2 + 2), ())
    assert found["m.running_mean"] == only_of(rank % 2)
    check_refused({"m": half}, "m", "process_group", ranks=Ranks(0, 2, (rank, (rank + 1) % 4)))
    own = aiockpt.PerRank(quiet)
    assert set(placings(collect({"m": own}, ranks=RANKS)).values()) == {PER_RANK}
    """,
    )


def test_meshes_count_by_global_ranks_and_plans_by_those_of_the_group(start: Start) -> None:
    """A job of two ranks of four; a mesh with others is refused by name, a mesh of one rank is a plain tensor."""
    check(
        start,
        """
    members = (3, 1)
    mesh, wide = DeviceMesh("cpu", [1, 3]), DeviceMesh("cpu", [0, 1, 2, 3])
    alone = [DeviceMesh("cpu", [number], _init_backend=False) for number in range(4)][rank]
    outside = distribute_tensor(torch.ones(8), wide, [Shard(0)])
    lone = DTensor.from_local(torch.ones(3), alone, [Shard(0)], run_check=False)
    if rank in members:
        ranks = Ranks(members.index(rank), 2, members)
        tensor = distribute_tensor(torch.arange(5.0), mesh, [Shard(0)])
        same = distribute_tensor(torch.ones(2), mesh, [Replicate()])
        collected = collect({"w": tensor, "lone": lone, "same": same}, ranks=ranks)
        assert placings(collected) == {
            "w": Sharding((2,), (1, 0), (Cut(0, 0),)), "lone": UNDECLARED, "same": Sharding((2,), (1, 0), ())}
        assert [entry.shape for entry in collected.entries] == [(5,), (3,), (2,)]
        plan = plan_local(collected.entries, collected.tree, {}, rank=ranks.rank, world=2)
        mine = next(part for part in plan.parts if part.entry == 0)
        assert mine.shape == tuple(tensor._local_tensor.shape) == ((3,) if rank == 1 else (2,))
        for refusing, word in ((ranks, "ranks 0, 2"), (Ranks(0, 1, (rank,)), "alone")):
            check_refused({"x": {"outside": outside}}, "x.outside", word, "process_group", ranks=refusing)
        assert placings(collect({"x": lone}, ranks=Ranks(0, 1, (rank,)))) == {"x": UNDECLARED}
    """,
    )


def test_shards_without_elements(start: Start, tmp_path: Path) -> None:
    """Tied ones are tied on the ranks too that have nothing of them, and those that are not are not."""
    check(
        start,
        """
    mesh = init_device_mesh("cpu", (4,))
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Embedding(2, 3)
            self.last = nn.Linear(3, 2, bias=False)
            self.last.weight = self.first.weight
            self.other = nn.Linear(3, 2, bias=False)
            self.third = nn.Linear(3, 2, bias=False)
    model = Tied()
    fully_shard(model, mesh=mesh)
    state = {"model": model, "x": {"e": distribute_tensor(torch.ones(0, 4), mesh, [Shard(1)])}}
    collected, plan, plans = plans_of(state)
    assert list(placings(collected)) == ["model.first.weight", "model.other.weight", "model.third.weight", "x.e"]
    merged(plans)
    save_together(run, state)
    other = Tied()
    fully_shard(other, mesh=mesh)
    with torch.no_grad():
        other.first.weight.zero_()
    restore(run, {"model": other, "x": state["x"]}, rank=rank)
    assert torch.equal(other.last.weight.full_tensor(), model.first.weight.full_tensor())
    """,
        tmp_path / "run",
    )


def test_what_is_of_each_rank_comes_back_to_it(start: Start, tmp_path: Path) -> None:
    """Values, tensors, generators; a DTensor is nobody's own."""
    check(
        start,
        """
    torch.manual_seed(rank)
    own = aiockpt.PerRank({"position": rank, "history": torch.full((rank + 1,), float(rank)), "path": "x" * rank})
    state = {"own": own, "rng": aiockpt.RNG(), "epoch": 3, "same": torch.ones(4)}
    save_together(run, state, replicated=["same"])
    drawn = torch.rand(3)
    live = {
        "own": aiockpt.PerRank({"position": -1, "history": torch.zeros(rank + 1), "path": ""}),
        "rng": aiockpt.RNG(), "epoch": 0, "same": torch.zeros(4),
    }
    restore(run, live, rank=rank)
    assert torch.equal(torch.rand(3), drawn)
    assert live["own"].value["position"] == rank and live["own"].value["path"] == "x" * rank
    assert live["own"].value["history"].eq(rank).all()
    assert live["epoch"] == 3 and live["same"].eq(1).all()
    mesh = init_device_mesh("cpu", (4,))
    check_refused({"own": aiockpt.PerRank(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))}, "own", "PerRank")
    """,
        tmp_path / "run",
    )


def test_the_stages_of_a_pipeline_are_not_made_one(start: Start) -> None:
    """Each on its slice of a mesh: nothing says that the other slices hold the same, and they do not."""
    check(
        start,
        """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = rank // 2
    model = nn.Sequential(collections.OrderedDict({str(stage): nn.Linear(4, 4)}))
    fully_shard(model, mesh=mesh["dp"])
    collected, plan, plans = plans_of({"model": model})
    assert set(placings(collected).values()) == {Sharding((2,), (2 * stage, 2 * stage + 1), (Cut(0, 0),))}
    assert len(merged(plans).folders) == 1
    """,
    )


def test_shards_that_an_optimizer_owns_are_copied_behind_its_back(start: Start) -> None:
    """Its next step waits for them; a write that does not is found, and named by the whole tensor's name."""
    check(
        start,
        """
    import dataclasses
    from tests.staging.rig import PATIENCE_SECONDS, SMALL, Rig, raw
    mesh = init_device_mesh("cpu", (4,))
    model = Transformer()
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer)
    state = {"model": model, "optimizer": optimizer}
    rig = Rig(rank=rank, world=world, thresholds=dataclasses.replace(SMALL, lazy_nbytes=64))

    def stage():
        return rig.stage_collected(collect(state, ranks=RANKS))

    assert stage().wait(PATIENCE_SECONDS)
    train(model, optimizer, steps=1)
    with rig.held() as gate:
        collected = collect(state, ranks=RANKS)
        expected = [raw(tensor) for tensor in collected.tensors]
        staging = rig.stage_collected(collected)
        assert staging.lazy_nbytes > 0
        del collected
        gate.set()
        train(model, optimizer)
    assert staging.wait(PATIENCE_SECONDS), staging.error
    for part, offset, nbytes in zip(rig.plan.parts, rig.plan.offsets, rig.plan.sizes):
        assert raw(rig.arena.bytes_at(offset, nbytes)) == expected[part.entry]
    with rig.held():
        staging = stage()
        model.embed.weight._local_tensor.data.add_(1)
    staging.wait(PATIENCE_SECONDS)
    assert isinstance(staging.error, aiockpt.TornSnapshotError) and staging.error.keys == ("model.embed.weight",)
    rig.close()
    """,
    )


def test_a_replica_that_drifted_is_probed_on_every_rank(start: Start) -> None:
    """DDP: all ranks but one agree, within eight saves, whoever writes the tensor. HSDP: among those of one shard."""
    check(
        start,
        """
    from aiockpt.planning.local import PlanCache
    from aiockpt.staging.probes import Prober

    def differing(state):
        plans, prober, names = PlanCache(rank=rank, world=world), Prober(rank), set()
        for number in range(8):
            collected = collect(state, ranks=RANKS)
            plan = plans.plan(collected.entries, collected.tree, {})
            mine = prober.take(plan, collected, number, step=number).result()
            found = [None] * world
            dist.all_gather_object(found, mine)
            for other in found:
                for group in mine.keys() & other.keys():
                    assert mine[group].keys() == other[group].keys()
                    names |= {name for name in mine[group] if mine[group][name] != other[group][name]}
        return names

    model = DDP(Transformer())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer)
    state = {"model": model, "optimizer": optimizer}
    assert differing(state) == set()
    if rank == 2:
        with torch.no_grad():
            optimizer.state[model.module.head.weight]["exp_avg"].mul_(1.0001)
    assert differing(state) == {"optimizer.state.model.head.weight.exp_avg"}

    sharded = Transformer()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    assert differing({"model": sharded}) == set()
    if rank == 3:
        sharded.head.weight._local_tensor.add_(1)
    assert differing({"model": sharded}) == ({"model.head.weight"} if rank % 2 else set())
    """,
    )
