"""One word in the store of a group: who finds it, who does not, and what a store that is gone does."""

from __future__ import annotations

import gc
import secrets
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from aiockpt.coordinator.rendezvous import Group, Meeting, Refusal, Rendezvous, find_group
from aiockpt.errors import CheckpointError, ConfigError, StorageError, WorkerStartError
from tests.waiting import PATIENCE_SECONDS, wait_until

RUN = "/runs/exp1"


class Members:
    """Stands for a process group."""


def group(store: Any, rank: int, *, members: tuple[int, ...] = (0, 1), of: object | None = None) -> Group:
    return Group(
        rank=rank,
        world=len(members),
        members=members,
        store=store,
        process_group=of or Members(),  # type: ignore[arg-type]
    )


def meeting(port: int = 1) -> Meeting:
    return Meeting(
        host="127.0.0.1",
        port=port,
        token=secrets.token_hex(32),
        run_id="run",
        term=3,
        meet=".meet-" + "0" * 32,
        package="1",
    )


def tcp(timeout: float = PATIENCE_SECONDS) -> tuple[dist.TCPStore, dist.TCPStore]:
    """Return a server and a client of it."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore(
        "127.0.0.1", server.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout)
    )
    return server, client


@pytest.fixture(scope="module", autouse=True)
def _warm_up() -> None:
    """The first server of a process makes one pipe for good."""
    tcp()


Pair = tuple[Any, Any]


@pytest.fixture(params=["tcp", "file", "hash", "prefix"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    """A store as two ranks have it."""
    if request.param == "tcp":
        return tcp()
    if request.param == "hash":
        return (dist.HashStore(),) * 2
    if request.param == "file":
        path = str(tmp_path / "store")
        return dist.FileStore(path, 2), dist.FileStore(path, 2)
    server, client = tcp()
    return dist.PrefixStore("0/", server), dist.PrefixStore("0/", client)


@pytest.fixture
def opening() -> Iterator[Callable[..., Rendezvous]]:
    """Make a Rendezvous; it is closed at the end."""
    made: list[Rendezvous] = []

    def opening(group: Group, run: str = RUN) -> Rendezvous:
        made.append(Rendezvous(group, run))
        return made[-1]

    yield opening
    for rendezvous in made:
        rendezvous.close()
        rendezvous.close()
    made.clear()  # pytest keeps the function that holds it, for longer than the leak check waits


def test_what_rank_0_publishes_is_found(pair: Pair, opening: Any) -> None:
    """Nothing before it, and then as often as somebody looks."""
    hub, member = opening(group(pair[0], 0)), opening(group(pair[1], 1))
    assert member.look() is None
    word = meeting()
    hub.publish(word)
    assert member.look() == member.look() == word


def test_a_refusal_is_found(pair: Pair, opening: Any) -> None:
    """The other ranks raise what rank 0 raised, with its fields."""
    hub, member = opening(group(pair[0], 0)), opening(group(pair[1], 1))
    hub.publish(Refusal.of(ConfigError("taken", why="a job", next="end it", argument="run", path=RUN)))
    found = member.look()
    assert isinstance(found, Refusal)
    error = found.as_exception()
    assert isinstance(error, ConfigError)
    assert (error.what, error.why, error.next) == ("rank 0: taken", "a job", "end it")
    assert (error.argument, error.path) == ("run", RUN)


def test_what_a_former_job_left_is_found_first(opening: Any) -> None:
    """The store outlived it, the number of the opening is the same: who looks again finds the new word."""
    store = dist.HashStore()
    opening(group(store, 0)).publish(meeting(1))
    member = opening(group(store, 1))
    stale = member.look()
    assert stale is not None
    assert stale.port == 1
    opening(group(store, 0)).publish(meeting(2))
    again = member.look()
    assert again is not None
    assert again.port == 2


def test_openings_meet_by_their_number(opening: Any) -> None:
    """A rank that opens the run again, before rank 0 has, does not find the opening that it has left."""
    store = dist.HashStore()
    first, second = Members(), Members()
    hubs = [opening(group(store, 0, of=first)) for _ in range(2)]
    members = [opening(group(store, 1, of=second)) for _ in range(2)]
    hubs[0].publish(meeting(1))
    assert members[1].look() is None
    hubs[1].publish(meeting(2))
    assert [member.look().port for member in members] == [1, 2]


def test_who_never_meets(opening: Any) -> None:
    """Another run, other ranks, an opening over another group of the same ranks that came before."""
    store = dist.HashStore()
    keys = {
        opening(group(store, 0)).key,
        opening(group(store, 0), RUN + "0").key,
        opening(group(store, 0, members=(0, 2))).key,
    }
    assert len(keys) == 3
    assert opening(group(store, 1)).key in keys


def test_numbers_go_with_the_group() -> None:
    """Training that makes its group anew, with ranks that were replaced, begins anew."""
    store = dist.HashStore()
    own = Members()
    first = Rendezvous(group(store, 0, of=own), RUN).key
    assert Rendezvous(group(store, 0, of=own), RUN).key != first
    del own
    gc.collect()
    assert Rendezvous(group(store, 0, of=Members()), RUN).key == first


@pytest.mark.parametrize("word", ["", "x", "{}", "[]", '{"type":"other"}', '{"type":"meeting","host":1}'])
def test_what_rank_0_did_not_say(word: str, opening: Any) -> None:
    """Is nothing."""
    store = dist.HashStore()
    member = opening(group(store, 1))
    store.set(member.key, word)
    assert member.look() is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (StorageError("full", why="ENOSPC", next="free", errno=28, path="/x"), StorageError),
        (ValueError("a bug"), CheckpointError),
        (KeyboardInterrupt(), CheckpointError),
    ],
    ids=repr,
)
def test_errors_as_data(error: BaseException, kind: type[CheckpointError]) -> None:
    """Ours keep class and fields; any other one is named."""
    made = Refusal.of(error).as_exception()
    assert type(made) is kind
    assert made.why
    assert made.next
    assert getattr(made, "errno", None) == getattr(error, "errno", None)


@pytest.mark.parametrize("kind", ["", "os", "SystemExit", "_rebuild", "NewerError"])
def test_an_error_of_a_class_that_is_not_known(kind: str) -> None:
    """Of a newer version, or none of ours."""
    error = Refusal(kind=kind, what="a", why="b", next="c", fields={"path": "/x", "rank": 3}).as_exception()
    assert type(error) is CheckpointError
    assert str(error) == "rank 0: a\nwhy: b\nnext: c"


def test_a_call_of_training_that_waits_holds_nothing(opening: Any) -> None:
    """A blocking ``get`` holds its connection; ours is another one."""
    server, client = tcp()
    waiting = threading.Thread(target=client.get, args=("later",))
    waiting.start()
    member = opening(group(client, 1))
    assert member.look() is None
    assert waiting.is_alive()
    server.set("later", "now")
    waiting.join(PATIENCE_SECONDS)
    assert not waiting.is_alive()


def store_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "aiockpt-store"]


def no_answer(call: Callable[[], object]) -> WorkerStartError:
    with pytest.raises(WorkerStartError, match="store does not answer") as caught:
        call()
    assert caught.value.why
    assert "rank 0" in caught.value.next
    return caught.value


@pytest.mark.process
def test_a_store_whose_server_died(opening: Any) -> None:
    """An error at the next look, and for who publishes: not a word that nobody reads."""
    server, client = tcp(timeout=1.0)
    rendezvous = opening(group(client, 1))
    assert rendezvous.look() is None
    del server
    gc.collect()
    no_answer(rendezvous.look)
    no_answer(lambda: rendezvous.publish(meeting()))


@pytest.mark.process
def test_a_store_whose_server_died_before(opening: Any) -> None:
    """Connecting anew is tried for as long as the store's time-out says: nobody waits for that."""
    server, client = tcp(timeout=1.0)
    rendezvous = opening(group(client, 1))
    del server
    gc.collect()
    assert "0.05 s" in no_answer(lambda: rendezvous.look(timeout=0.05)).why
    rendezvous.close()
    wait_until(lambda: not store_threads(), "the thread to come back")


@pytest.mark.process
def test_the_thread_ends(opening: Any) -> None:
    """It is made by the first call; after the end there are no calls."""
    store = dist.HashStore()
    unused, used = (opening(group(store, rank)) for rank in (0, 1))
    wait_until(lambda: not store_threads(), "the threads of other tests to end")
    used.look()
    (thread,) = store_threads()
    unused.close()
    used.close()
    assert "closed" in no_answer(used.look).why
    assert "closed" in no_answer(unused.look).why
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()


def test_alone() -> None:
    """Without torch.distributed, and in a job of one rank."""
    assert find_group(None) is None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = dist.group.WORLD
    try:
        assert find_group(None) is None
        assert find_group(world) is None
    finally:
        dist.destroy_process_group()
    with pytest.raises(ConfigError, match="process_group cannot be used"):
        find_group(world)
