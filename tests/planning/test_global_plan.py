"""What several ranks say of their plans: joined where it fits, refused by name where it does not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from aiockpt.errors import PlanMismatchError, ProtocolError
from aiockpt.format.manifest import FileRecord, Plan
from aiockpt.format.tree import Node, walk
from aiockpt.planning.global_plan import GlobalPlan, merge
from aiockpt.planning.local import Entry, LocalPlan, plan_local
from aiockpt.planning.mismatch import ranks_text
from aiockpt.planning.placings import Placing, only_of, replicated
from aiockpt.planning.sharding import Cut, Sharding
from tests.planning.files import tree_of
from tests.planning.job import Job, State, body_of, merged

WORLD = 4


def tensor(path: str, placing: Placing = None, dtype: str = "F32", shape: tuple[int, ...] = (4,)) -> Entry:
    return Entry(tuple(path.split("/")), dtype, shape, "", placing)


def plans(state_of: Callable[[int], list[Entry]], world: int = WORLD) -> list[LocalPlan]:
    return [plan_local(state_of(rank), tree_of(state_of(rank)), rank=rank, world=world) for rank in range(world)]


def trees(*by_rank: Node, entries: list[Entry] | None = None) -> GlobalPlan:
    """Return the plan of ranks that differ in their trees alone."""
    found = entries or []
    return merged([plan_local(found, tree, rank=rank, world=len(by_rank)) for rank, tree in enumerate(by_rank)])


def refused(make: Callable[[], Any]) -> PlanMismatchError:
    with pytest.raises(PlanMismatchError) as caught:
        make()
    assert caught.value.next
    return caught.value


def stage(rank: int) -> list[Entry]:
    """Two pipeline stages of two ranks each, data-parallel within."""
    first = rank // 2 * 2
    mesh = Sharding((2,), (first, first + 1), ())
    return [tensor(f"model/layer{first + n}", mesh) for n in range(2)] + [tensor("model/shared", replicated(WORLD))]


def test_stages_become_one_plan() -> None:
    """Entries of one stage, entries of all, one tree; every rank of a stage has a share."""
    job = Job(WORLD, lambda rank: State(stage(rank)))
    assert len({plan.digest for plan in job.plans}) == 2
    plan = job.manifest().plan
    leaves = dict(walk(plan.tree))
    assert {path[1] for path in leaves} == {"layer0", "layer1", "layer2", "layer3", "shared"}
    files = {plan.names[number]: job.records[plan.entry_files[number]].rank for number in range(len(plan.names))}
    assert files == {"layer0": 0, "layer1": 1, "layer2": 2, "layer3": 3, "shared": 0}


CHANGES: dict[str, Callable[[Entry], Entry]] = {
    "dtype": lambda entry: entry._replace(dtype="I32"),
    "shape": lambda entry: entry._replace(shape=(8,)),
    "mark": lambda entry: entry._replace(mark="C128"),
    "undeclared": lambda entry: entry._replace(placing=None),
    "cuts": lambda entry: entry._replace(placing=Sharding((WORLD,), tuple(range(WORLD)), ())),
    "mesh": lambda entry: entry._replace(placing=Sharding((2, 2), tuple(range(WORLD)), (Cut(0, 0),))),
    "ranks": lambda entry: entry._replace(placing=Sharding((WORLD,), (1, 0, 2, 3), (Cut(0, 0),))),
    "stride": lambda entry: entry._replace(placing=Sharding((WORLD,), tuple(range(WORLD)), (Cut(0, 0, 2),))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_one_name_that_is_two_things(change: Callable[[Entry], Entry]) -> None:
    """A differing dtype, shape or rule is named with its key and the ranks that differ."""
    common = [tensor("model/a"), tensor("model/layers.0/w", Sharding((WORLD,), tuple(range(WORLD)), (Cut(0, 0),)))]
    error = refused(lambda: merged(plans(lambda rank: [common[0], change(common[1]) if rank == 2 else common[1]])))
    assert error.keys == ("model.layers.0.w",)
    assert error.ranks == (2,)
    assert "ranks 0 to 1, 3" in error.why
    assert "rank 2" in error.why
    assert "PerRank" in error.next


def test_a_hole_in_a_tensor() -> None:
    """A rank of its mesh that does not have it is named."""
    cut = Sharding((WORLD,), tuple(range(WORLD)), (Cut(0, 0),))
    error = refused(lambda: merged(plans(lambda rank: [tensor("m/a")] + [tensor("m/b", cut)] * (rank != 3))))
    assert (error.keys, error.ranks) == (("m.b",), (3,))
    assert "missing on rank 3" in error.why


def test_a_rank_outside_of_the_mesh() -> None:
    """A tensor that stands on a rank which its mesh does not have."""
    rule = Sharding((2,), (0, 1), (Cut(0, 0),))
    error = refused(lambda: merged(plans(lambda rank: [tensor("m/b", rule)] if rank < 3 else [])))
    assert (error.keys, error.ranks) == (("m.b",), (2,))


def test_a_tensor_that_one_rank_alone_has_to_say() -> None:
    """Others have theirs, stage nothing of it, and nobody asks them."""
    job = Job(WORLD, lambda rank: State([tensor("m/mean", only_of(1)), tensor("m/w", replicated(WORLD))]))
    staged = [[plan.parts[i].entry for i in plan.order] for plan in job.plans]
    assert [0 in entries for entries in staged] == [False, True, False, False]
    plan = job.manifest().plan
    assert job.records[plan.entry_files[plan.names.index("mean")]].rank == 1
    error = refused(lambda: merged(plans(lambda rank: [tensor("m/mean", only_of(1))] if rank != 1 else [])))
    assert (error.keys, error.ranks) == (("m.mean",), (1,))


def test_undeclared_tensors_of_some_ranks() -> None:
    """The lowest rank that has the name writes it; a file of which lower ranks have all is not needed."""
    job = Job(WORLD, lambda rank: State([tensor("m/all")] + [tensor("m/late")] * (rank >= 2)))
    assert [job.plan.writes_extra(rank, "m") for rank in range(WORLD)] == [True, False, True, False]
    plan = job.manifest().plan
    assert [job.records[file].rank for file in plan.entry_files] == [0, 2]
    assert plan.placings == ["undeclared"]


def joined(*by_rank: tuple[Node, list[Any]]) -> tuple[Node, list[Any]]:
    """Return the tree and the values of ranks that have no tensors."""
    found = [plan_local([], tree, rank=rank, world=len(by_rank)) for rank, (tree, _) in enumerate(by_rank)]
    plan = merged(found)
    lists = {
        one.digest: msgspec.json.encode([values[number] for number in one.common_values])
        for one, (_, values) in zip(found, by_rank, strict=True)
    }
    return msgspec.json.decode(plan.encode([]), type=Plan).tree, json.loads(plan.merge_values(lists))


def test_the_tree_of_several() -> None:
    """Mappings and modules grow by their keys, in the order in which ranks have them."""
    tree, values = joined(
        ({"m": ["module", {"a": -1}, -2], "x": {"k": -3}}, ["a", {"": 1}, "k"]),
        (
            {"x": {"l": -1}, "m": ["module", {"b": -2}, -3], "y": ["OrderedDict", [["k", -4]]]},
            ["l", "b", {"": 1, "b": 2}, "y"],
        ),
        ({"y": ["OrderedDict", [[{"~tuple": []}, -1]]]}, ["z"]),
    )
    assert list(tree) == ["m", "x", "y"]
    assert {path: values[-1 - leaf] for path, leaf in walk(tree)} == {
        ("m", "a"): "a",
        ("m", "b"): "b",
        ("x", "k"): "k",
        ("x", "l"): "l",
        ("y", "k"): "y",
        ("y", '{"~tuple":[]}'): "z",
    }
    assert values[-1 - tree["m"][2]] == {"": 1, "b": 2}


def test_a_dict_that_has_other_keys_on_one_rank() -> None:
    """A dict with text keys and one with others are one type."""
    tree, values = joined(({"d": {"a": -1}}, [1]), ({"d": ["dict", [["a", -2], [3, -1]]]}, [2, 1]))
    assert tree == {"d": ["dict", [["a", -1], [3, -2]]]}
    assert values == [1, 2]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"k": ["list", [-1, -2]]}, {"k": ["list", [-1]]}),
        ({"k": ["list", [-1]]}, {"k": ["tuple", [-1]]}),
        ({"k": {"a": -1}}, {"k": -1}),
        ({"k": {"a": -1}}, {"k": ["OrderedDict", [["a", -1]]]}),
        ({"k": ["defaultdict", [["a", -1]]]}, {"k": ["defaultdict:list", [["a", -1]]]}),
        ({"k": ["module", {}, None]}, {"k": {}}),
        ({"k": ["per_rank", -1]}, {"k": -1}),
        ({"k": 0}, {"k": 1}),
        ({"k": 0}, {"k": ["bytes", 0]}),
        ({"k": ["ndarray", 0, "<f4"]}, {"k": ["ndarray", 0, "<f8"]}),
        ({"k": ["dict", [[1, -1]]]}, {"k": ["dict", [["1", -1]]]}),
    ],
)
def test_trees_that_contradict_each_other(first: Node, second: Node) -> None:
    """The place is named, what stands there on either, and the ranks."""
    entries = [tensor("m/a"), tensor("m/b")]
    for one, other in ((first, second), (second, first)):
        error = refused(lambda one=one, other=other: trees(one, other, entries=entries))  # type: ignore[misc]
        assert error.keys is not None
        assert error.keys[0].startswith("k")
        assert error.ranks == (1,)
        assert " on lower ranks, and " in error.why


def test_values_that_differ() -> None:
    """Named by key; ranks with equal plans are compared by whoever has their values."""
    error = refused(lambda: joined(({"a": -1, "lr": -2}, [1, 0.1]), ({"lr": -1, "b": -2}, [0.2, 1])))
    assert (error.keys, error.ranks) == (("lr",), (1,))
    assert "0.1" in error.why
    assert "0.2" in error.why


def groups(*names: str, **options: Any) -> list[Any]:
    return [{"lr": 0.1, "params": list(names), **options}]


def test_groups_of_optimizers_over_stages() -> None:
    """Each stage has other parameters in its groups; all else must be equal."""
    nodes = [{"o": {"param_groups": -1}, f"x{rank}": -2} for rank in range(3)]
    names = ["a", "b"], ["c"], ["a", "d"]
    _, values = joined(
        *((node, [groups(*some), rank]) for rank, (node, some) in enumerate(zip(nodes, names, strict=True)))
    )
    assert values[0] == groups("a", "b", "c", "d")
    other = (
        [{"lr": 0.1, "params": ["c"], "eps": 1}],
        groups("c", lr=0.2),
        groups("c") * 2,
        [{"lr": 0.1, "params": 3}],
        {},
    )
    for group in other:
        error = refused(lambda group=group: joined((nodes[0], [groups("a"), 0]), (nodes[1], [group, 1])))  # type: ignore[misc]
        assert error.keys == ("o.param_groups",)


def test_groups_that_are_a_tree() -> None:
    """Where a group has tensors, such as its learning rate, its names are a value of their own."""
    tree = {"o": {"param_groups": ["list", [{"lr": -1, "params": -2}]]}}
    _, values = joined((tree, [0.1, ["a"]]), ({**tree, "x": -3}, [0.1, ["b"], 0]))
    assert values == [0.1, ["a", "b"], 0]


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        ({"": 1}, {"a": 2}, {"": 1, "a": 2}),
        ({"~OrderedDict": [["", {"v": 1}]]}, {"~OrderedDict": [["", {"v": 1}], ["a", 2]]}, 2),
        ({"": 1}, {"": 2}, None),
        ({"": 1}, {"~OrderedDict": [["", 1]]}, None),
        ({"": 1}, [], None),
        ({"~dict": [[1, 1]]}, {"~dict": [[2, 1]]}, None),
    ],
)
def test_metadata_of_modules_over_stages(first: Any, second: Any, both: Any) -> None:
    """A line for each submodule that a rank has; one that two ranks have must be equal."""
    by_rank = ({"m": ["module", {}, -1]}, [first]), ({"m": ["module", {}, -1], "x": -2}, [second, 0])
    if both is None:
        assert refused(lambda: joined(*by_rank)).keys == ("m._metadata",)
        return
    _, values = joined(*by_rank)
    assert values[0] == both or len(values[0]["~OrderedDict"]) == both


def test_one_body_has_its_values_as_they_are() -> None:
    """Nothing is decoded for an SPMD job."""
    plan = trees({"a": -1}, {"a": -1})
    (digest,) = {plan_local([], {"a": -1}, rank=0, world=2).digest}
    assert plan.merge_values({digest: b"[ 1 ]"}) == b"[ 1 ]"


@pytest.mark.parametrize("values", [b"[1]", b"[1,2,3]", b"{}", b"[1,"])
def test_values_that_are_not_those_of_the_plan(values: bytes) -> None:
    """Refused before the manifest is written."""
    nodes = {"a": -1, "b": -2}, {"a": -1, "c": -2}
    digests = [plan_local([], node, rank=0, world=2).digest for node in nodes]
    with pytest.raises(ProtocolError, match="values"):
        trees(*nodes).merge_values({digests[0]: b"[1,2]", digests[1]: values})


@pytest.mark.parametrize("change", [0, 3, 10, 40, -1])
def test_bytes_that_are_no_body(change: int) -> None:
    """Cut or changed at any place: an error of ours, or another plan; never anything else."""
    plan = plans(lambda rank: [tensor("m/a", replicated(2))], world=2)[0]
    good = body_of(plan)
    for data in (good[:change], good[:change] + b"\xff" + good[change + 1 :]):
        with pytest.raises((ProtocolError, PlanMismatchError)):
            merge({plan.digest: data}, {plan.digest: [0, 1]}, world=2)


@pytest.mark.parametrize("ranks", [[0], [0, 0], [0, 1, 2], [0, 2]])
def test_each_rank_has_one_body(ranks: list[int]) -> None:
    """Anything else is a bug of the caller."""
    plan = plans(lambda rank: [], world=2)[0]
    with pytest.raises(ValueError, match="one body"):
        merge({plan.digest: body_of(plan)}, {plan.digest: ranks}, world=2)


def test_a_rank_without_its_file() -> None:
    """A plan is not encoded over files that are not there."""
    plan = merged(plans(lambda rank: [tensor("m/a")]))
    with pytest.raises(ValueError, match="no tensor file"):
        plan.encode([FileRecord(path="m/config.json", nbytes=3, data_start=0, sum="")])


def stages(count: int, world: int) -> tuple[dict[str, bytes], dict[str, range]]:
    """Return the bodies of a large job: each stage has tensors and ordered keys of its own, and shares some."""
    bodies, ranks_of = {}, {}
    length = world // count
    for first in range(0, world, length):
        mesh = Sharding((length,), tuple(range(first, first + length)), (Cut(0, 0),))
        own = [tensor(f"model/stage{first}.layer{n}", mesh, shape=(1024, 64)) for n in range(40)]
        entries = [*own, *(tensor(f"model/shared{n}", replicated(world)) for n in range(10))]
        tree = tree_of(entries)
        tree["order"] = ["OrderedDict", [[f"stage{first}.{n}", -1 - n] for n in range(40)]]
        plan = plan_local(entries, tree, rank=first, world=world)
        bodies[plan.digest] = body_of(plan)
        ranks_of[plan.digest] = range(first, first + length)
    return bodies, ranks_of


def test_work_grows_with_what_differs() -> None:
    """Eight times as many stages take about eight times as long, however many they are."""
    times = []
    for count in (32, 256):
        bodies, ranks_of = stages(count, 1024)
        start = time.process_time()
        plan = merge(bodies, ranks_of, world=1024)
        plan.merge_values({digest: msgspec.json.encode(list(range(40))) for digest in bodies})
        times.append(time.process_time() - start)
    assert times[0] < 1.0  # 0.02 alone
    assert times[1] < 24 * times[0]


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3"),
        ([0, 1, 2], "ranks 0 to 2"),
        ([5, 1], "ranks 1, 5"),
        (range(0, 40, 2), "ranks 0, 2, 4, 6, 8, 10, 12, 14, …"),
    ],
)
def test_ranks_for_people(ranks: Any, text: str) -> None:
    """Runs are short, and there are few of them."""
    assert ranks_text(ranks) == text
