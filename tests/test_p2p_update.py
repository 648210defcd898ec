"""Updates by reads: ranks get weights out of the host memory of ranks that hold them, bit for bit."""

from __future__ import annotations

import contextlib
import pickle
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import pytest
import torch

from checkpoint_engine.errors import (
    AgreementError,
    CheckpointBusyError,
    CheckpointExistsError,
    ManifestError,
    RegionGoneError,
    SettingsError,
    UpdateError,
)
from checkpoint_engine.manifest import RankManifest
from checkpoint_engine.memory.region import HostRegion
from checkpoint_engine.planning.peers import Receiver, plan_fetch
from checkpoint_engine.server import UpdateReport
from checkpoint_engine.server.holders import check_holder, with_holders
from checkpoint_engine.server.receivers import SLOTS, FetchUpdater
from checkpoint_engine.server.sources import Metas
from checkpoint_engine.transport.peer.base import open_transport
from helpers.fleet import Orders, Worker, digests, request, server, share_of, tensors, workers
from helpers.netns import INTERFACE, TwoHosts
from helpers.ports import free_ports
from helpers.ranks import Ranks, _context, run_ranks, start_ranks

KIB = 1 << 10
SECONDS = 30.0


def hold(rank: int, world_size: int, out: list[Connection], pipes: list[Connection], copies: int, layers: int) -> None:
    """A source: tells the metas through `out`, and obeys its pipe. copies: how many ranks hold each tensor."""
    with server(peer_wait=0.5) as ps:
        everything = tensors(1, layers)
        mine = {k: v for c in range(copies) for k, v in share_of(everything, (rank + c) % world_size, world_size).items()}
        ps.register_checkpoint("c", named_tensors=mine)
        ps.gather_metas("c")
        if rank == 0:
            out[0].send(ps.get_metas().to_json())
        while True:
            if not pipes[rank].poll(SECONDS):
                raise TimeoutError("nobody let the source go")
            match pipes[rank].recv():
                case "unregister":
                    try:
                        ps.unregister_checkpoint("c")
                        pipes[rank].send("")
                    except CheckpointBusyError as e:
                        pipes[rank].send(str(e))
                case "register":
                    ps.register_checkpoint("c", named_tensors={k: torch.zeros_like(v) for k, v in mine.items()})
                    ps.gather_metas("c")
                case "go":
                    return


class Sources:
    """A world of real servers that hold a checkpoint, and its metas as a file would have them."""

    def __init__(self, world_size: int, copies: int = 1, layers: int = 6, may_die: tuple[int, ...] = (), **options: Any) -> None:
        mine, theirs = _context.Pipe(duplex=False)
        pairs = [_context.Pipe() for _ in range(world_size)]
        self.pipes = [ours for ours, _ in pairs]
        self.ranks = start_ranks(
            hold, world_size, [theirs], [into for _, into in pairs], copies, layers, may_die=may_die, **options
        )
        if not mine.poll(SECONDS):
            self.ranks.__exit__()
            raise TimeoutError("no metas")
        self.metas: bytes = mine.recv()

    def tell(self, command: str, rank: int) -> str:
        self.pipes[rank].send(command)
        if not self.pipes[rank].poll(SECONDS):
            raise TimeoutError(f"source {rank} did not answer {command}")
        answer: str = self.pipes[rank].recv()
        return answer

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                for pipe in self.pipes:
                    with contextlib.suppress(OSError):  # it was killed
                        pipe.send("go")
                self.ranks.results()
        finally:
            self.ranks.__exit__()


def join(rank: int, world_size: int, crew: list[Worker], metas: bytes, changes: dict[str, Any]) -> Any:
    """As a caller of the contract: a world of its own, gather with nothing, load, update by its own ranks."""
    with server(bucket_bytes=64 * KIB, **changes) as ps:
        ps.gather_metas("c")
        ps.load_metas(pickle.loads(pickle.dumps(Metas.from_json(metas))))  # noqa: S301  (as callers do)
        reports = [ps.update("c", request(crew[rank], rank), ranks=list(range(world_size)))]
        reports.append(ps.update("c", request(crew[rank], rank), ranks=list(range(world_size))))
        return reports, crew[rank].state()


@pytest.mark.parametrize("transport", ["shm", "tcp", "mooncake", "nixl"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_new_world_reads_a_running_one(world_size: int, transport: str) -> None:
    try:
        open_transport(transport).close()
    except SettingsError as e:
        pytest.skip(str(e))
    named = {"CHECKPOINT_ENGINE_PEER_TRANSPORT": transport}  # there, too
    with workers(world_size) as crew, Sources(2, env=named) as sources:
        results = run_ranks(join, world_size, crew, sources.metas, {"peer_transport": transport})
    for reports, (version, dirty, params, _) in results:
        assert params == digests(tensors(1))
        assert not dirty
        assert version == reports[0].version
        for report in reports:
            _check(report, transport)


def _join_by_slots(rank: int, world_size: int, crew: list[Worker], metas: bytes, changes: dict[str, Any]) -> Any:
    FetchUpdater._into_ring = lambda *_: False  # type: ignore[method-assign]
    return _join_held(rank, world_size, crew, metas, changes)


def test_reads_through_slots_as_on_a_gpu() -> None:
    with workers(1) as crew, Sources(2, layers=30) as sources:
        (state,) = run_ranks(_join_by_slots, 1, crew, sources.metas, {"peer_transport": "tcp"})
    assert state[2] == digests(tensors(1, 30)), state


def _slots_stay(rank: int, world_size: int, crew: list[Worker], metas: bytes) -> Any:
    """How many regions each update took."""
    FetchUpdater._into_ring = lambda *_: False  # type: ignore[method-assign]
    taken, free = [], {"free_after_update": True}
    with server(bucket_bytes=64 * KIB, peer_transport="tcp") as ps:
        ps.gather_metas("c")
        ps.load_metas(Metas.from_json(metas))
        settings = ps._settings
        for orders, changes in [(Orders(), {})] * 2 + [(Orders(raise_in_bucket=3), {})] + [(Orders(), free)] * 2:
            ps._settings = settings.replace(**changes)
            with HostRegion(1) as before, contextlib.suppress(UpdateError):
                ps.update("c", request(crew[rank], rank, orders), ranks=[0])
            with HostRegion(1) as after:
                taken.append(after.generation - before.generation - 1)
        return taken, crew[rank].state()


def test_slots_are_taken_once() -> None:
    """And again after an update that failed, or that gave everything back."""
    with workers(1) as crew, Sources(1, layers=30) as sources:
        ((taken, state),) = run_ranks(_slots_stay, 1, crew, sources.metas)
    assert [regions // SLOTS for regions in taken] == [1, 0, 0, 1, 1], taken  # besides them a ring at most
    assert state[2] == digests(tensors(1, 30)) and not state[1]


def _check(report: UpdateReport, transport: str) -> None:
    total = sum(t.nbytes for t in tensors(1).values())
    assert report.method == f"p2p ({transport})"
    assert report.nbytes == total
    assert sum(stages["fetch"].nbytes for stages in report.ranks) == total  # each byte once, over all receivers


def _some_of_a_world(rank: int, world_size: int, crew: list[Worker], chosen: list[int], all_call: bool) -> Any:
    with server(bucket_bytes=64 * KIB, peer_transport="tcp") as ps:
        held = share_of(tensors(1), rank, 2) if rank < 2 else {}
        if held:
            ps.register_checkpoint("c", named_tensors=held)
        ps.gather_metas("c")
        asked: list[list[tuple[str, str]]] = []

        def ask(handles: list[tuple[str, str]]) -> None:
            asked.append(handles)
            request(crew[rank], rank)(handles)

        report = None
        if all_call or rank in chosen:
            report = ps.update("c", ask, ranks=chosen)
        ps.store_based_barrier()  # in step with all, whoever updated; and sources stay until they are read
        return report, asked, crew[rank].state()


def _become_a_source(rank: int, world_size: int, crew: list[Worker], metas: bytes, out: list[Connection], pipe: Any) -> Any:
    """Joins, keeps what it read, and serves it until it hears something."""
    with server(bucket_bytes=64 * KIB) as ps:
        ps.load_metas(Metas.from_json(metas))
        ps.update("c", request(crew[rank], rank), ranks=list(range(world_size)), keep=True)
        with pytest.raises((AgreementError, CheckpointExistsError), match="registered already"):
            ps.update("c", request(crew[rank], rank), ranks=list(range(world_size)), keep=True)
        ps.gather_metas("c")
        if rank == 0:
            out[0].send(ps.get_metas().to_json())
            if not pipe.poll(SECONDS):
                raise TimeoutError("nobody let the joiner go")
            pipe.recv()
        ps.store_based_barrier()
        ps.unregister_checkpoint("c")
        assert ps.watch.status().checkpoints == ()
        return crew[rank].state()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_joiner_becomes_a_source(world_size: int) -> None:
    """The servers that it read from are gone when others read from it: first alone, then named behind those that are gone."""
    mine, theirs = _context.Pipe(duplex=False)
    ours, into = _context.Pipe()
    changes = {"peer_transport": "tcp", "connect_timeout": 2.0}
    with workers(world_size) as first, workers(1) as second, contextlib.ExitStack() as stack:
        with Sources(2, layers=10) as sources:
            joiners = stack.enter_context(start_ranks(_become_a_source, world_size, first, sources.metas, [theirs], into))
            if not mine.poll(SECONDS):
                joiners.results(1.0)  # says why
            old, new = Metas.from_json(sources.metas), Metas.from_json(mine.recv())
        check_holder(old, new)
        together = with_holders(old, [new])
        spread = plan_fetch(together, [[Receiver(9, "far")]]).bytes_by_nic()
        assert len(spread) == 2 + world_size  # later joiners read from all of them
        for metas in (new, together):
            (state,) = run_ranks(_join_held, 1, second, metas.to_json(), changes)
            assert state[2] == digests(tensors(1, 10)), state
        ours.send("go")
        results = joiners.results()
    assert [state[2] for state in results] == [digests(tensors(1, 10))] * world_size


@pytest.mark.parametrize(("chosen", "all_call"), [([1], True), ([1, 2], False), ([2], False)])
def test_some_ranks_of_a_world(chosen: list[int], all_call: bool) -> None:
    with workers(3) as crew:
        results = run_ranks(_some_of_a_world, 3, crew, chosen, all_call)
    for rank, (report, asked, (version, _, params, _)) in enumerate(results):
        if rank in chosen:
            assert params == digests(tensors(1))
            assert version == report.version
            assert [bool(handle) for _, handle in asked[0]] == [r in chosen for r in range(3)]  # callers slice it by rank
        else:
            assert params == {} and version is None and not asked
            assert (report.method if all_call else report) == ("none" if all_call else None)
    total = sum(t.nbytes for t in tensors(1).values())
    own = sum(t.nbytes for t in share_of(tensors(1), 1, 2).values()) if 1 in chosen else 0
    report = results[chosen[0]][0]
    assert sum(stages["fetch"].nbytes for stages in report.ranks) == total - own  # what a member holds nobody reads
    assert report.nbytes == total


def _join_held(rank: int, world_size: int, crew: list[Worker], metas: bytes, changes: dict[str, Any], hold_up: Any = None) -> Any:
    """One joiner in a world of its own; tells errors instead of raising. hold_up: a pipe; the update says on it when its first
    bucket is there, and goes on when it hears something."""

    def progress(nbytes: int) -> None:
        nonlocal hold_up
        if hold_up is not None:
            pipe, hold_up = hold_up, None
            pipe.send("reading")
            if not pipe.poll(SECONDS):
                raise TimeoutError("nobody let the joiner go on")
            pipe.recv()

    with server(bucket_bytes=64 * KIB, **changes) as ps:
        ps.load_metas(Metas.from_json(metas))
        start = time.monotonic()
        try:
            ps.update("c", request(crew[rank], rank), ranks=[0], progress=progress)
        except UpdateError as e:
            return str(e), time.monotonic() - start
        return crew[rank].state()


@contextlib.contextmanager
def half_way(crew: list[Worker], metas: bytes, changes: dict[str, Any], **options: Any) -> Iterator[tuple[Ranks, Connection]]:
    """A joiner that has its first bucket, has read as far ahead as it can, and waits for a word on the pipe."""
    mine, theirs = _context.Pipe()
    with start_ranks(_join_held, 1, crew, metas, changes, theirs, **options) as joiner:
        assert mine.poll(SECONDS)
        assert mine.recv() == "reading"
        yield joiner, mine


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("early", [True, False])
def test_a_source_that_is_gone_is_replaced(sig: signal.Signals, early: bool) -> None:
    changes = {"peer_transport": "tcp", "connect_timeout": 1.0}
    with workers(1) as crew, Sources(3, copies=2, layers=30, may_die=(1,)) as sources:
        if early:
            sources.ranks.kill(1, sig)
            (state,) = run_ranks(_join_held, 1, crew, sources.metas, changes)
        else:
            with half_way(crew, sources.metas, changes) as (joiner, pipe):
                sources.ranks.kill(1, sig)
                pipe.send("go on")
                (state,) = joiner.results()
        if sig == signal.SIGSTOP:
            sources.ranks.kill(1)
    assert state[2] == digests(tensors(1, 30)), state


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("early", [True, False])
def test_a_source_that_nobody_can_replace_is_named(early: bool, sig: signal.Signals) -> None:
    changes = {"peer_transport": "tcp", "connect_timeout": 1.0}
    with workers(1) as crew, Sources(2, layers=30, may_die=(1,)) as sources:
        if early:
            sources.ranks.kill(1, sig)
            (found,) = run_ranks(_join_held, 1, crew, sources.metas, changes)
        else:
            with half_way(crew, sources.metas, changes) as (joiner, pipe):
                sources.ranks.kill(1, sig)
                pipe.send("go on")
                (found,) = joiner.results()
        version, dirty, _, _ = crew[0].state()
        if sig == signal.SIGSTOP:
            sources.ranks.kill(1)
    message, seconds = found
    assert "stage fetch" in message and "rank 1 (" in message and "only ranks [1] held it" in message
    assert seconds < 10
    assert version is None
    assert dirty is not early  # some of it was loaded


@contextlib.contextmanager
def silence() -> Iterator[tuple[str, int]]:
    """An address where connections are taken, and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        yield door.getsockname()[:2]


@pytest.mark.parametrize("kind", ["port closed", "wrong address", "wrong token"])
def test_a_source_that_is_not_where_the_metas_say(kind: str) -> None:
    """It is named by its deadline; by metas that name another holder, too, the same engine is updated."""
    changes = {"peer_transport": "tcp", "connect_timeout": 1.0}
    with workers(1) as crew, Sources(1) as good, silence() as address:
        metas = Metas.from_json(good.metas)
        offer = metas.offers[0]
        assert offer is not None
        bad = {
            "port closed": msgspec.structs.replace(offer, addresses=(("127.0.0.1", free_ports(1)),)),
            "wrong address": msgspec.structs.replace(offer, addresses=(address,)),
            "wrong token": msgspec.structs.replace(offer, token="guess"),
        }[kind]
        alone = Metas("c", metas.ranks, (msgspec.structs.replace(bad, name="rank 0 (elsewhere)"),))
        (found,) = run_ranks(_join_held, 1, crew, alone.to_json(), changes)
        assert "stage fetch" in found[0] and "rank 0 (elsewhere) at" in found[0] and found[1] < 10, found
        assert crew[0].state()[:2] == (None, False)
        (state,) = run_ranks(_join_held, 1, crew, with_holders(alone, [metas]).to_json(), changes)
        assert state[2] == digests(tensors(1)), state


@pytest.mark.parametrize("other", [True, False], ids=["another holder", "no other"])
def test_a_link_that_goes_down(netns: TwoHosts, other: bool) -> None:
    here, there = netns.hosts
    changes = {"peer_transport": "tcp", "connect_timeout": 1.0}
    with contextlib.ExitStack() as stack:
        crew = stack.enter_context(workers(1))
        env = {"CHECKPOINT_ENGINE_PEER_HOSTS": there.address}
        metas = Metas.from_json(stack.enter_context(Sources(1, layers=30, hosts=[there], env=env)).metas)
        if other:
            env = {"CHECKPOINT_ENGINE_PEER_HOSTS": "127.0.0.1"}
            near = Metas.from_json(stack.enter_context(Sources(1, layers=30, hosts=[here], env=env)).metas)
            third = RankManifest(0, "host-c", "", near.ranks[0].regions)  # else it alone would be read
            metas = with_holders(metas, [Metas("c", (third,), near.offers)])
        with half_way(crew, metas.to_json(), changes, hosts=[here]) as (joiner, pipe):
            subprocess.run(["ip", "-n", here.namespace, "link", "set", INTERFACE, "down"], check=True, timeout=30)
            pipe.send("go on")
            (found,) = joiner.results()
    if other:
        assert found[2] == digests(tensors(1, 30)), found
    else:
        assert f"at {there.address}:" in found[0] and "stage fetch" in found[0] and found[1] < 15, found


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_checkpoint_is_not_unregistered_under_a_reader(transport: str) -> None:
    changes = {"peer_transport": transport}
    with workers(1) as crew, Sources(1, layers=30) as sources:
        with half_way(crew, sources.metas, changes) as (joiner, pipe):
            assert "is in use" in sources.tell("unregister", 0)
            pipe.send("go on")
            (state,) = joiner.results()
        assert state[2] == digests(tensors(1, 30)), state
        assert sources.tell("unregister", 0) == ""
        (found,) = run_ranks(_join_held, 1, crew, sources.metas, changes)
        assert "rank 0 (" in found[0] and "not served any more" in found[0]
        sources.pipes[0].send("register")  # other bytes, under the same name and of the same layout
        (found,) = run_ranks(_join_held, 1, crew, sources.metas, changes)
        assert "rank 0 (" in found[0] and "served" in found[0]
        assert crew[0].state()[:3] == state[:3]


def test_a_joiner_that_leaves_half_way_holds_nothing_up() -> None:
    with workers(2) as crew, Sources(2, copies=2, layers=30) as sources:
        with half_way(crew[:1], sources.metas, {"peer_transport": "tcp"}) as (joiner, _):
            joiner.kill(0)
            (state,) = run_ranks(_join_held, 1, crew[1:], sources.metas, {"peer_transport": "tcp"})
        assert state[2] == digests(tensors(1, 30))
        assert [sources.tell("unregister", rank) for rank in range(2)] == ["", ""]  # its leases ended with it


def _cancelled(rank: int, world_size: int, crew: list[Worker], chosen: list[int], early: bool) -> Any:
    """Rank 1, a receiver, has enough of it before it begins, or with its first bucket."""
    with server(bucket_bytes=64 * KIB, peer_transport="tcp") as ps:
        if rank == 0:
            ps.register_checkpoint("c", named_tensors=tensors(1, 30))
        ps.gather_metas("c")
        said = ""

        def cancel_at_once() -> None:
            while not ps.watch.cancel("enough"):
                time.sleep(0.001)

        def progress(nbytes: int) -> None:
            if rank == 1 and not early:
                ps.watch.cancel("enough")

        canceller = threading.Thread(target=cancel_at_once)
        if rank == 1 and early:
            canceller.start()
        try:
            ps.update("c", request(crew[rank], rank), ranks=chosen, progress=progress)
        except UpdateError as e:
            said = f"rank {e.rank}, {e.stage}: {e.reason}"
        if canceller.ident is not None:
            canceller.join()
        ps.store_based_barrier()
        report = ps.update("c", request(crew[rank], rank), ranks=chosen)
        ps.store_based_barrier()
        return said, report.method, crew[rank].state()[2]


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("chosen", [[1, 2], [0, 1, 2]], ids=["some", "all"])
def test_an_update_of_some_ranks_is_cancelled(chosen: list[int], early: bool) -> None:
    with workers(3) as crew:
        results = run_ranks(_cancelled, 3, crew, chosen, early)
    for rank, (said, method, params) in enumerate(results):
        if rank in chosen:
            assert said == "rank 1, cancel: enough"
            assert method.startswith("p2p") and params == digests(tensors(1, 30))  # the next one is not
        else:
            assert (said, params) == ("", {})


def _disagree(rank: int, world_size: int, metas: bytes) -> str:
    with server() as ps:
        mine = Metas.from_json(metas)
        ps.load_metas(mine if rank == 0 else Metas("c", mine.ranks, mine.offers[::-1]))
        with pytest.raises(AgreementError) as raised:
            ps.update("c", request(None, rank), ranks=[0, 1])
        ps.store_based_barrier()
        return str(raised.value)


def test_receivers_with_different_metas_do_not_begin() -> None:
    with Sources(2) as sources:
        for said in run_ranks(_disagree, 2, sources.metas):
            assert "receivers 0 and 1" in said and "other metas" in said


def test_four_joiners_at_once() -> None:
    with workers(4) as crew, Sources(2, copies=2) as sources, contextlib.ExitStack() as stack:
        changes = {"peer_transport": "tcp"}
        joiners = [stack.enter_context(start_ranks(_join_held, 1, [one], sources.metas, changes)) for one in crew]
        for joiner in joiners:
            (state,) = joiner.results()
            assert state[2] == digests(tensors(1))


def test_a_source_on_another_host(netns: TwoHosts) -> None:
    here, there = netns.hosts
    with workers(1) as crew, Sources(1, hosts=[there], env={"CHECKPOINT_ENGINE_PEER_HOSTS": there.address}) as sources:
        (state,) = run_ranks(_join_held, 1, crew, sources.metas, {"peer_transport": "tcp"}, hosts=[here])
        assert there.address.encode() in sources.metas
    assert state[2] == digests(tensors(1)), state


def _switched_off(rank: int, world_size: int) -> None:
    with server() as ps:
        ps._p2p_store = None
        ps.register_checkpoint("c", named_tensors=tensors(1))
        ps.gather_metas("c")
        with pytest.raises(ManifestError, match="name no rank that can be read"):
            ps.update("c", request(None, 0), ranks=[0])


def test_a_server_that_is_no_source() -> None:
    run_ranks(_switched_off, 1)


def _pushed_under_a_reader(rank: int, world_size: int) -> None:
    with server(peer_wait=0.2) as ps:
        with pytest.raises(SettingsError):  # after it has registered and gathered
            ps.push(tensors(1), engines=[])
        metas = ps.get_metas()
        assert isinstance(metas, Metas) and metas.offers[0] is not None
        transport = open_transport("tcp")
        with transport.connect(metas.offers[0], seconds=5), pytest.raises(CheckpointBusyError, match="in use"):
            ps.push(tensors(2), engines=[])
        with pytest.raises(SettingsError):
            ps.push(tensors(2), engines=[])
        with pytest.raises(RegionGoneError):
            transport.connect(metas.offers[0], seconds=5)


def test_a_push_does_not_reuse_memory_under_a_reader() -> None:
    run_ranks(_pushed_under_a_reader, 1)
