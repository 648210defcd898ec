"""A fleet that lost a server updates again with the ranks that are left, and with all when it is back."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection
from typing import Any

import pytest

from checkpoint_engine.errors import AgreementError, PeerLostError, SettingsError, UpdateError
from helpers.fleet import Handles, Orders, Worker, digests, request, server, share_of, tensors, workers
from helpers.ports import free_ports
from helpers.ranks import _context, start_ranks

KIB = 1 << 10
SMALL = {"bucket_bytes": 64 * KIB}
SECONDS = 30.0


def _hold(ps: Any, name: str, seed: int, rank: int, world_size: int) -> None:
    ps.register_checkpoint(name, named_tensors=share_of(tensors(seed), rank, world_size))
    ps.gather_metas(name)


def _until_one_dies(ps: Any, crew: list[Worker], rank: int, victim: int) -> str:
    def ask(handles: Handles) -> None:
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        crew[rank].update(handles[rank][1])

    _hold(ps, "one", 1, rank, 3)
    ps.update("one", request(crew[rank], rank), version="one")
    with pytest.raises(UpdateError) as caught:
        ps.update("one", ask)
    return str(caught.value)


def _member(rank: int, world_size: int, crew: list[Worker], victim: int, ports: list[int], back: list[Connection]) -> Any:
    """Ranks that are left go on as a world of two, then as one of three with a process in the victim's place."""
    with server(**SMALL) as ps:
        said = _until_one_dies(ps, crew, rank, victim)
        with pytest.raises((PeerLostError, AgreementError), match="is gone"):
            ps.update("one", request(crew[rank], rank))  # in the world that it was part of, nothing goes any more
        with pytest.raises(SettingsError, match="a new world needs another"):
            ps.regroup(rank=0, world_size=2)
        place = [r for r in range(3) if r != victim].index(rank)
        ps.regroup(rank=place, world_size=2, master_port=ports[0])
        assert (ps.rank, ps.world_size) == (place, 2)
        assert "one" in ps._registry  # what it held it holds still
        _hold(ps, "two", 2, place, 2)
        two = ps.update("two", request(crew[rank], place), version="two")
        states = [crew[rank].state()[:3]]
        if place == 0:
            back[0].send("come")
        ps.regroup(rank=rank, world_size=3, master_port=ports[1])
        _hold(ps, "three", 3, rank, 3)
        three = ps.update("three", request(crew[rank], rank), version="three")
        return said, (two.notes, three.notes), [*states, crew[rank].state()[:3]]


def _newcomer(rank: int, world_size: int, crew: list[Worker], place: int, port: int) -> Any:
    os.environ.update(RANK=str(place), WORLD_SIZE="3", MASTER_PORT=str(port))
    with server(**SMALL) as ps:
        _hold(ps, "three", 3, place, 3)
        ps.update("three", request(crew[place], place), version="three")
        return crew[place].state()[:3]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_fleet_goes_on_without_a_server_and_takes_it_back(victim: int) -> None:
    ports = [free_ports(), free_ports()]
    mine, theirs = _context.Pipe(duplex=False)
    with workers(3) as crew, start_ranks(_member, 3, crew, victim, ports, [theirs], may_die=[victim]) as left:
        assert mine.poll(SECONDS), left.results(1)
        with start_ranks(_newcomer, 1, crew, victim, ports[1]) as newcomer:
            (new,) = newcomer.results()
        results = left.results()
    assert new == ("three", False, digests(tensors(3)))
    for rank, result in enumerate(results):
        if rank == victim:
            continue
        said, notes, states = result
        assert f"rank {victim}" in said
        assert states == [("two", False, digests(tensors(2))), ("three", False, digests(tensors(3)))]
        assert notes == ((), ())


def _left_of_a_world(rank: int, world_size: int, crew: list[Worker]) -> Any:
    """Rank 2 held nothing that the others do not hold, too: they need no new world, only to name themselves."""
    with server(**SMALL) as ps:
        if rank < 2:
            ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, 2))
        else:
            ps.register_checkpoint("c", named_tensors=share_of(tensors(1), 0, 2))
        ps.gather_metas("c")

        def ask(handles: Handles) -> None:
            if rank == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            crew[rank].update(handles[rank][1], Orders(lag=0.0))

        with pytest.raises(UpdateError, match="rank 2"):
            ps.update("c", ask, version="lost")
        report = ps.update("c", request(crew[rank], rank), ranks=[0, 1], version="left")
        return report.method, crew[rank].state()[:3]


def test_ranks_that_are_left_update_from_what_they_hold() -> None:
    with workers(3) as crew, start_ranks(_left_of_a_world, 3, crew, may_die=[2]) as ranks:
        results = ranks.results()
    for method, state in results[:2]:
        assert method.startswith("p2p")
        assert state == ("left", False, digests(tensors(1)))
