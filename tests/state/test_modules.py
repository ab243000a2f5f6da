from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.nn.parallel import DistributedDataParallel

from aiockpt.errors import UnsupportedValueError
from aiockpt.state.collect import collect
from aiockpt.state.modules import ModuleItems, places, raw_state_dict, read_module, unwrap
from aiockpt.state.parameters import parameter_names
from tests.state.rebuild import round_trip, same


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 1)))


def compiled(module: nn.Module) -> nn.Module:
    """Wrap as torch.compile does; the eager backend saves the import of inductor, and nothing is compiled anyway."""
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


NAMES = list(net().state_dict())


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def restore_by_hand(live: nn.Module, saved: nn.Module) -> ModuleItems:
    """Load ``saved`` into ``live`` as a restore does, by either way."""
    source, read = read_module(saved), read_module(live)
    items = {
        name: item.detach().clone() if isinstance(item, torch.Tensor) else item for name, item in source.items.items()
    }
    if read.needs_load_state_dict:
        read.module.load_state_dict(raw_state_dict(read, items, source.metadata))
    else:
        with torch.no_grad():
            for name, item in items.items():
                read.items[name].copy_(item)
    return read


def test_a_plain_module_is_read_as_its_live_tensors():
    """Names, order and memory are those of the module; batch norm needs no load_state_dict."""
    model = net()
    read = read_module(model)
    assert list(read.items) == NAMES
    assert read.raw_names == {name: name for name in NAMES}
    assert read.items["0.weight"] is model[0].weight
    assert read.items["1.running_mean"] is model[1].running_mean
    assert not read.needs_load_state_dict
    assert read.metadata == {"1": {"version": 2}}  # modules of version 1 are left out


def _compiled_inside() -> nn.Module:
    model = net()
    model[2] = compiled(model[2])
    return model


def _checkpointed_inside() -> nn.Module:
    model = net()
    model[2] = checkpoint_wrapper(model[2])
    model[0] = offload_wrapper(model[0])
    return model


def _both_inside() -> nn.Module:
    model = net()
    model[0] = checkpoint_wrapper(compiled(model[0]))
    model[2] = compiled(checkpoint_wrapper(model[2]))
    return compiled(model)


WRAPPED = {
    "compiled": lambda: compiled(net()),
    "checkpointed": lambda: checkpoint_wrapper(net()),
    "compiled inside": _compiled_inside,
    "checkpointed inside": _checkpointed_inside,
    "both inside": _both_inside,
    "data parallel": lambda: nn.DataParallel(net()),
    "ddp": lambda: DistributedDataParallel(net()),
    "compiled ddp of both": lambda: compiled(DistributedDataParallel(_both_inside())),
    "ddp of compiled": lambda: DistributedDataParallel(compiled(net())),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_leave_no_trace_in_names(kind: str, process_group: None):
    """A wrapped model has the names, the metadata and the optimizer's parameter names of the plain one."""
    plain, wrapped = net(), WRAPPED[kind]()
    read = read_module(wrapped, ("model",))
    assert list(read.items) == NAMES
    assert read.metadata == read_module(plain).metadata
    assert not read.needs_load_state_dict
    raw = read.module.state_dict()
    assert {read.raw_names[name] for name in NAMES} == raw.keys()
    for name in NAMES:
        assert raw[read.raw_names[name]].data_ptr() == read.items[name].data_ptr()
    ids = {name: id(parameter) for name, parameter in plain.named_parameters()}
    names = parameter_names({"model": wrapped})
    assert sorted(names.values()) == sorted(f"model.{name}" for name in ids)
    assert {names[id(parameter)] for parameter in wrapped.parameters()} == set(names.values())


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_model_loads_through_load_state_dict(kind: str, process_group: None):
    """The state dict made for ``load_state_dict`` has the wrapped keys, and metadata at each path torch looks at."""
    wrapped = WRAPPED[kind]()
    read = read_module(wrapped)
    other = net()
    nn.init.constant_(other[0].weight, 7.0)
    source = read_module(other)
    state = raw_state_dict(read, {name: item.detach().clone() for name, item in source.items.items()}, source.metadata)
    result = read.module.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(same(item.detach(), source.items[name].detach()) for name, item in read_module(wrapped).items.items())
    assert state._metadata.keys() == read.module.state_dict()._metadata.keys()  # type: ignore[attr-defined]
    assert state._metadata == read.module.state_dict()._metadata  # type: ignore[attr-defined]


def test_a_fully_sharded_module_of_one_rank_is_read_whole(process_group: None):
    """FSDP1 on one rank gives whole tensors under plain names, and loads through its own hooks."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def wrap(model: nn.Sequential) -> nn.Module:
        model[2] = FullyShardedDataParallel(model[2], device_id=torch.device("cpu"))
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls FSDP1 deprecated, and world size 1 pointless
        saved, live = wrap(net()), wrap(net())
        with torch.no_grad():
            for parameter in saved.parameters():
                parameter.add_(1)
        assert list(read_module(saved).items) == NAMES
        read = restore_by_hand(live, saved)
        assert read.needs_load_state_dict
        back = live.state_dict()
        assert all(same(back[name], item) for name, item in saved.state_dict().items())


def test_a_fully_sharded_module_of_many_ranks_is_refused(process_group: None):
    """Its ``state_dict()`` would be a collective."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(FullyShardedDataParallel(nn.Linear(1, 1), device_id=torch.device("cpu")))
        model[0].world_size = 2
        with pytest.raises(UnsupportedValueError, match="FullyShardedDataParallel") as caught:
            collect({"m": model})
    assert caught.value.key == "m.0"


def test_only_types_make_a_wrapper():
    """A user's attribute with the name of a wrapper's keeps its segment, at any depth."""

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(1, 1)
            self._orig_mod = nn.Linear(1, 1)
            self._checkpoint_wrapped_module = nn.Linear(1, 1)

    model = nn.Sequential(Mine())
    model[0] = compiled(model[0])
    assert list(read_module(model).items) == [
        f"0.{inner}.{kind}"
        for inner in ("module", "_orig_mod", "_checkpoint_wrapped_module")
        for kind in ("weight", "bias")
    ]


def test_items_of_a_module_stand_under_its_path():
    """Entries have the path of the module and one segment for the item's name, as the tree has."""
    collected = collect({"models": {"gen": nn.Linear(2, 1)}})
    assert [entry.segments for entry in collected.entries] == [("models", "gen", "weight"), ("models", "gen", "bias")]
    assert collected.tree == {"models": {"gen": ["module", {"weight": 0, "bias": 1}, -1]}}
    assert collected.values == [(("models", "gen", "_metadata"), {})]
    assert [(found.path, type(found.read)) for found in collected.objects] == [(("models", "gen"), ModuleItems)]


def test_non_persistent_buffers_are_left_out():
    """What ``state_dict()`` leaves out is not saved."""
    model = nn.Linear(1, 1)
    model.register_buffer("scratch", torch.ones(3), persistent=False)
    model.register_buffer("kept", torch.ones(3))
    model.register_buffer("none", None)
    assert list(read_module(model).items) == ["weight", "bias", "kept"]


def test_tied_weights_are_stored_once():
    """A shared parameter is one entry at two places, with one name for the optimizer."""
    model = nn.Sequential(OrderedDict(emb=nn.Embedding(4, 2), body=nn.Linear(2, 2), head=nn.Linear(2, 4, bias=False)))
    model.head.weight = model.emb.weight
    collected = collect({"model": model})
    assert [entry.segments[1] for entry in collected.entries] == ["emb.weight", "body.weight", "body.bias"]
    assert collected.tree["model"][1]["head.weight"] == collected.tree["model"][1]["emb.weight"] == 0
    assert parameter_names({"model": model})[id(model.head.weight)] == "model.emb.weight"


def test_a_shared_submodule_has_each_of_its_names():
    """A module that stands at two places is found at both."""
    shared = nn.Linear(1, 1)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert [place.name for place in places(model)] == ["", "0.", "1.", "2."]
    assert list(read_module(model).items) == ["0.weight", "0.bias", "2.weight", "2.bias"]


class Extra(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.value = value

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


@pytest.mark.parametrize("value", [{"a": 1, "t": torch.arange(3)}, torch.ones(2), (1, None), b"x" * 5000], ids=type)
def test_extra_state_round_trips(value: Any):
    """Extra state may be a value, a tensor, or a container of both; its module goes through load_state_dict."""
    saved, live = nn.Sequential(Extra(value)), nn.Sequential(Extra(None))
    assert same(round_trip({"m": saved})["m"]["0._extra_state"], value)
    assert restore_by_hand(live, saved).needs_load_state_dict
    assert same(live[0].value, value)


class OwnLoad(nn.Linear):
    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        self.seen = local_metadata
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class OwnVersion(OwnLoad):
    _version = 3


def _with_hook(register: str) -> nn.Module:
    model = nn.Linear(1, 1)
    getattr(model, register)(lambda *args: None)
    return model


def _renamed() -> nn.Module:
    model = nn.Linear(1, 1)

    def rename(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state[f"{prefix}doubled"] = state[f"{prefix}weight"] * 2

    model.register_state_dict_post_hook(rename)
    return model


@pytest.mark.parametrize(
    "model",
    [
        OwnLoad(1, 1),
        _with_hook("register_load_state_dict_pre_hook"),
        _with_hook("register_load_state_dict_post_hook"),
        _renamed(),
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    ],
    ids=["own load", "pre hook", "post hook", "entry that is no parameter", "weight norm"],
)
def test_what_loads_in_its_own_way_is_known(model: nn.Module):
    """A submodule that does anything of its own while loading sends the whole module through load_state_dict."""
    assert read_module(nn.Sequential(nn.Linear(1, 1), model)).needs_load_state_dict


def test_versions_come_back_to_modules_that_ask():
    """A module's own loading sees the version with which it was saved, and 1 where it has none of its own."""
    for kind, version in ((OwnLoad, 1), (OwnVersion, 3)):
        saved, live = nn.Sequential(kind(1, 1)), compiled(nn.Sequential(compiled(kind(1, 1))))
        restore_by_hand(live, saved)
        assert unwrap(unwrap(live)[0]).seen == {"version": version}


def test_a_hook_may_return_another_dict():
    """State dict hooks run, and what they leave is what is saved."""
    model = nn.Linear(1, 1)
    model._register_state_dict_hook(lambda module, state, prefix, metadata: {"only": state["weight"]})
    read = read_module(model)
    assert list(read.items) == ["only"]
    assert read.metadata is None
    assert collect({"m": model}).tree == {"m": ["module", {"only": 0}, None]}


def test_an_overridden_state_dict_need_not_take_arguments():
    """The outermost module's ``state_dict(self)`` is enough."""

    class Own(nn.Linear):
        def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
            return {"w": self.weight}

        def load_state_dict(self, state: dict[str, Any]) -> None:  # type: ignore[override]
            self.weight = state["w"]

    read = read_module(Own(1, 1))
    assert list(read.items) == ["w"]
    assert read.needs_load_state_dict


def test_state_dict_that_raises_is_named():
    """An error in the user's code says which key it belongs to, and is the cause."""

    class Bad(nn.Linear):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no")

    with pytest.raises(UnsupportedValueError, match=r"'a\.b'.*RuntimeError: no") as caught:
        collect({"a": {"b": Bad(1, 1)}})
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_lazy_modules_are_refused_until_they_have_a_shape():
    """An uninitialised parameter is refused by its full name; after a forward pass it is saved."""
    model = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(UnsupportedValueError, match="lazy") as caught:
        collect({"net": model})
    assert caught.value.key == "net.0.weight"
    model(torch.ones(1, 3))
    assert list(read_module(model).items) == ["0.weight", "0.bias"]
    assert not read_module(model).needs_load_state_dict


def test_a_module_that_holds_itself_is_refused():
    """A cycle among modules is an error with the key, not a RecursionError."""
    model = nn.Sequential(nn.Linear(1, 1))
    model[0].add_module("up", model)
    with pytest.raises(UnsupportedValueError, match="holds itself") as caught:
        collect({"net": model})
    assert caught.value.key == "net.0.up"


def test_names_that_meet_without_wrappers_are_refused():
    """Two items with one name once wrappers are removed are an error that names both."""
    model = compiled(nn.Sequential(nn.Linear(1, 1)))
    outer = nn.Sequential(OrderedDict(a=model))
    outer._register_state_dict_hook(lambda module, state, prefix, metadata: {**state, "a.0.weight": torch.ones(1)})
    with pytest.raises(UnsupportedValueError) as caught:
        collect({"m": outer})
    assert caught.value.key == repr("a._orig_mod.0.weight")
    assert caught.value.other_key == repr("a.0.weight")


def test_configs_become_plain_files():
    """A module with ``config.to_json_string()`` has its config beside its tensors, through wrappers too."""

    class Config:
        def __init__(self, text: str) -> None:
            self.text = text

        def to_json_string(self) -> str:
            return self.text

    model = nn.Linear(1, 1)
    model.config = Config('{"a": "ä"}')  # type: ignore[assignment]
    model.generation_config = Config("{}")  # type: ignore[assignment]
    for module in (model, compiled(checkpoint_wrapper(model))):
        assert collect({"my model": module}).plain_files == {
            "my%20model/config.json": '{"a": "ä"}'.encode(),
            "my%20model/generation_config.json": b"{}",
        }
    assert collect({"model": nn.Linear(1, 1), "deep": {"er": model}}).plain_files == {}


def test_reading_changes_nothing():
    """No gradient buffer, no version, no mode, no requires_grad is touched."""
    model = net()
    model[0].weight.requires_grad_(False)
    before = [(t._version, t.requires_grad, t.grad, t.data_ptr()) for t in [*model.parameters(), *model.buffers()]]
    collect({"model": model})
    after = [(t._version, t.requires_grad, t.grad, t.data_ptr()) for t in [*model.parameters(), *model.buffers()]]
    assert before == after
    assert all(t.grad_fn is None for t in collect({"model": model}).tensors)
