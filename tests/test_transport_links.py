"""Links between servers: who fails is named everywhere, strangers hold up nobody, and exchanges stay in step after failures."""

from __future__ import annotations

import contextlib
import datetime
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]

from checkpoint_engine.devices.cpu import CpuDevice
from checkpoint_engine.devices.polling import poll
from checkpoint_engine.errors import AgreementError, CheckpointEngineError, DeadlineError, PeerLostError
from checkpoint_engine.settings import Settings
from checkpoint_engine.transport.channel import MAGIC, PREAMBLE, Channel
from checkpoint_engine.transport.collective import join
from checkpoint_engine.transport.links import LEFT, Links
from checkpoint_engine.transport.messages import PROTOCOL, Failure, Given, Introduce, Lost, OverLink, Returned, Withdrawn

HOST = "127.0.0.1"
SETTINGS = Settings(connect_timeout=5.0, join_timeout=10.0)


class World:
    """All ranks' links in one process; `each` runs something on every rank at the same time."""

    def __init__(self, size: int) -> None:
        self.size, self.store = size, HashStore()
        self.store.set_timeout(datetime.timedelta(seconds=10))
        self.pool = ThreadPoolExecutor(size)
        self.links: list[Links] = []

    def meet(self) -> None:
        self.links = self.each(lambda rank: Links(rank, self.size, self.store, HOST, SETTINGS))

    def start(self, what: Callable[[int], Any], *ranks: int) -> list[Future[Any]]:
        return [self.pool.submit(what, rank) for rank in ranks or range(self.size)]

    def each(self, what: Callable[[int], Any], *ranks: int) -> list[Any]:
        return [future.result(30) for future in self.start(what, *ranks)]

    def exchange(self, what: str = "x", seconds: float = 10.0) -> Callable[[int], Any]:
        """A rank's part of an exchange: its payloads, or its error."""

        def call(rank: int) -> Any:
            try:
                return self.links[rank].exchange(what, b"%d" % rank, seconds)
            except CheckpointEngineError as e:
                return e

        return call

    def in_step(self) -> None:
        everybody = tuple(b"%d" % rank for rank in range(self.size))
        assert self.each(self.exchange("again")) == [everybody] * self.size


@contextlib.contextmanager
def _world(size: int) -> Iterator[World]:
    world = World(size)
    world.meet()
    try:
        yield world
    finally:
        for links in world.links:
            links.close()
        world.pool.shutdown()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_everybody_gets_everything_in_rank_order(size: int) -> None:
    with _world(size) as world:
        world.in_step()
        world.in_step()


@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_comes_too_late_is_named_and_finds_out(absent: int) -> None:
    with _world(3) as world:
        others = [rank for rank in range(3) if rank != absent]
        for error in world.each(world.exchange("gather", 0.05), *others):
            assert isinstance(error, DeadlineError | AgreementError)
            named = str(error).partition("waiting for ")[2]
            assert named in (f"rank {absent} to reach gather", f"ranks [{absent}] to reach gather")
        (late,) = world.each(world.exchange("gather"), absent)
        assert isinstance(late, AgreementError), "the others have withdrawn"
        assert f"[{absent}] to reach gather" in str(late)
        world.in_step()


def test_a_leader_that_was_alone_in_a_call_is_not_ahead_ever_after() -> None:
    """It stood still, and ended a call late that the others had given up; then went on to one that they never come to."""
    with _world(3) as world:
        world.in_step()
        for what in ("manifest of 'c'", "manifest of 'd'"):
            (error,) = world.each(world.exchange(what, 0.05), 0)
            assert isinstance(error, DeadlineError)
        alone = world.links[0]._round
        assert poll(lambda: all(alone in links._answers for links in world.links[1:]), 10)  # they have heard of it
        world.in_step()
        world.in_step()
        assert not any(links._answers or links._given for links in world.links)


def test_ranks_that_do_different_things() -> None:
    with _world(3) as world:
        futures = world.start(world.exchange("barrier"), 0, 2) + world.start(world.exchange("update"), 1)
        for future in futures:
            error = future.result(10)
            assert isinstance(error, AgreementError)
            assert "rank 1 is at update, rank 0 at barrier" in str(error)
        world.in_step()


def test_a_withdrawal_that_crosses_the_answer_changes_nothing() -> None:
    """A member gives up while the leader's answer is on its way: all others go on, and so does it."""
    with _world(2) as world:
        member = world.links[1]
        send = member.send

        def slow(rank: int, message: Any) -> None:
            send(rank, message)
            if isinstance(message, Withdrawn):
                member._dispatch(0, Given(message.round, (b"0", b"1")))

        member.send = slow  # type: ignore[method-assign]
        assert world.each(world.exchange("x", 0.01), 1) == [(b"0", b"1")]


def test_what_comes_too_late_is_not_kept() -> None:
    with _world(2) as world:
        assert isinstance(world.each(world.exchange("x", 0.01), 1)[0], DeadlineError)
        world.links[1]._dispatch(0, Given(1, (b"0", b"1")))
        assert isinstance(world.each(world.exchange("x"), 0)[0], AgreementError)
        world.in_step()
        world.in_step()
        assert not any(links._answers or links._given for links in world.links)


@pytest.mark.parametrize("gone", [0, 2])
def test_a_rank_that_left_or_died_is_named(gone: int) -> None:
    with _world(3) as world:
        inboxes = [world.links[r].inbox(1) for r in range(3) if r != gone]
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(inbox) for inbox in inboxes]
            waiting = world.start(world.exchange(), *(r for r in range(3) if r != gone))
            for channel in world.links[gone]._channels.values():
                channel.shutdown()  # as when its process dies
            for future in waiting:
                error = future.result(10)
                assert isinstance(error, PeerLostError | AgreementError)
                assert f"rank {gone} is gone" in str(error)
            for inbox in opened:
                entry = inbox.get(5)
                assert entry is not None and isinstance(entry[1], Lost)
                assert entry[1].rank == gone


def test_a_rank_that_says_goodbye() -> None:
    with _world(2) as world:
        world.links[1].close()
        (error,) = world.each(world.exchange(), 0)
        assert isinstance(error, PeerLostError)
        assert LEFT in str(error)


def test_a_peer_that_talks_nonsense_hears_that_the_link_is_over() -> None:
    with _world(2) as world:
        world.links[1]._channels[0].socket.send(struct.pack("<I", 3) + b"\xff\xff\xff")
        for rank in (0, 1):
            with world.links[rank].inbox(1) as inbox:
                entry = inbox.get(5)
                assert entry is not None and entry[1].rank == 1 - rank  # type: ignore[attr-defined]


def test_messages_wait_for_their_update_and_not_longer() -> None:
    with _world(2) as world:
        world.links[1].send(0, Returned(7))
        world.links[1].send(0, Failure(7, 1, "host", "join", "no memory"))
        with world.links[0].inbox(7) as inbox:
            assert inbox.get(5) == (1, Returned(7))
            assert inbox.get(5) == (1, Failure(7, 1, "host", "join", "no memory"))
            assert world.links[0].failure is not None, "also when it was taken out"
        assert world.links[0].failure is None
        world.links[1].send(0, Returned(7))
        world.links[1].send(0, Returned(8))
        with world.links[0].inbox(8) as inbox:
            assert inbox.get(5) == (1, Returned(8))
        assert not world.links[0]._inboxes


def _port(world: World) -> tuple[str, int]:
    host, _, port = world.store.get("link/0").decode().rpartition(":")
    return host, int(port)


def test_strangers_at_the_link_port_hold_up_nobody() -> None:
    """One says nothing, one says something else, one does not know the secret, one announces too much."""
    world = World(2)
    with contextlib.ExitStack() as stack:
        stack.callback(world.pool.shutdown)
        (leader,) = world.start(lambda rank: Links(0, 2, world.store, HOST, SETTINGS), 0)
        for words in (b"", b"GET / HTTP/1.1\r\n\r\n", PREAMBLE.pack(MAGIC, PROTOCOL) + struct.pack("<I", 1 << 20)):
            stack.enter_context(socket.create_connection(_port(world))).sendall(words)
        sock = socket.create_connection(_port(world))
        impostor: Channel[OverLink] = stack.enter_context(Channel(sock, "rank 0", OverLink, 5))  # type: ignore[arg-type]
        impostor.send(Introduce(1, b"guess"), seconds=5)
        with pytest.raises(PeerLostError):
            impostor.receive(seconds=5)
        member = Links(1, 2, world.store, HOST, SETTINGS)
        world.links = [leader.result(5), member]  # sooner than the silent one is given up
        for links in world.links:
            stack.callback(links.close)
        world.in_step()


def test_a_rank_that_never_comes_to_the_fleet() -> None:
    store = HashStore()
    with pytest.raises(DeadlineError, match=r"waiting for ranks \[1\] to join the fleet"):
        Links(0, 2, store, HOST, Settings(join_timeout=0.2))


def test_closing_an_abandoned_communicator_does_not_wait_for_its_broadcasts() -> None:
    """Each rank is in a broadcast that the other one never joins, as after a failure that found no agreement."""
    device, store = CpuDevice(), HashStore()
    store.set_timeout(datetime.timedelta(seconds=10))
    closed: list[int] = []

    def rank(number: int) -> None:
        prefix = PrefixStore("c", store)
        options: Any = {"store": prefix, "address": HOST, "settings": Settings(join_timeout=10.0, timeout=10.0)}
        collective = join(device, rank=number, world_size=2, **options)
        with device.stream("share") as stream:
            event = collective.broadcast(torch.zeros(1 << 16, dtype=torch.uint8), None, 1 - number, stream, None)
            assert not event.wait(0.05)
            collective.abandon(())
            with pytest.raises(PeerLostError, match="abandoned"):
                event.wait(5)
        collective.close()
        closed.append(number)

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert sorted(closed) == [0, 1]
