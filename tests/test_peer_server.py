"""The source's side: strangers, nonsense, limits, leases; and that a lease which ended spoils what was read under it."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
import torch

from checkpoint_engine.errors import (
    CheckpointEngineError,
    CheckpointError,
    DeadlineError,
    PeerLostError,
    ProtocolError,
    SettingsError,
    TransferError,
)
from checkpoint_engine.memory.region import HostRegion
from checkpoint_engine.transport.descriptors import whereabouts
from checkpoint_engine.transport.peer.base import (
    Deadline,
    Outcome,
    PeerOffer,
    PeerOptions,
    PeerTransport,
    ReadOp,
    RegionOffer,
    choose,
    open_transport,
)
from checkpoint_engine.transport.peer.connecting import Lease
from checkpoint_engine.transport.peer.server import PeerServer
from checkpoint_engine.transport.peer.serving import ServerLimits
from checkpoint_engine.transport.peer.wire import FROM_SOURCE, LENGTH, MAGIC, PREAMBLE, VERSION, Fetch
from helpers.peers import content

MIB = 1 << 20
SECONDS = 10.0
LIMITS = ServerLimits(greeting=0.5, idle=0.3, stalled=0.3, connections=3)


@pytest.fixture
def region() -> Iterator[HostRegion]:
    with HostRegion(2 * MIB) as made:
        made.view(0, 2 * MIB)[:] = content(0, 2 * MIB)
        yield made


@pytest.fixture
def shm() -> Iterator[PeerTransport]:
    with open_transport("shm", PeerOptions(connections=1)) as made:
        yield made


@pytest.fixture
def tcp() -> Iterator[PeerTransport]:
    with open_transport("tcp", PeerOptions(connections=1)) as made:
        yield made


@pytest.fixture
def server(region: HostRegion, shm: PeerTransport) -> Iterator[PeerServer]:
    with PeerServer("rank 3 (here)", ["127.0.0.1"], [shm]) as made:
        made.add(region)
        yield made


def lease(offer: PeerOffer) -> Lease:
    return Lease("source", offer.addresses[0], offer.token, "tcp", offer.regions, Deadline.after(SECONDS))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def readable(offer: PeerOffer, transport: PeerTransport) -> bool:
    memory = torch.zeros(2 * MIB, dtype=torch.uint8)
    with transport.connect(offer, seconds=SECONDS) as peer:
        peer.submit_read(transport.register(memory), [ReadOp(0, 0, 2 * MIB, 0)], seconds=SECONDS).wait()
    return bytes(memory.numpy()) == content(0, 2 * MIB)


def test_the_offer_survives_json(server: PeerServer) -> None:
    offer = server.offer()
    assert PeerOffer.from_json(offer.to_json()) == offer
    assert (offer.name, offer.transports, offer.whereabouts) == ("rank 3 (here)", ("tcp", "shm"), whereabouts())
    assert 0 < offer.regions[0].generation < 1 << 53
    assert offer.regions[0].nbytes == 2 * MIB
    with pytest.raises(msgspec.ValidationError):
        PeerOffer.from_json(b'{"name": 1}')


def test_generations_are_unlike(region: HostRegion) -> None:
    """Of two servers, and of one region that is offered twice: what was true of the one says nothing of the other."""
    with PeerServer("a", ["127.0.0.1"]) as a, PeerServer("b", ["127.0.0.1"]) as b:
        offers = [a.add(region), b.add(region), a.add(region)]
        assert len({offer.generation for offer in offers}) == 3
        assert a.offer().token != b.offer().token


def test_several_addresses(region: HostRegion, tcp: PeerTransport) -> None:
    with PeerServer("rank 0", ["127.0.0.1", "127.0.0.2"]) as server:
        server.add(region)
        offer = server.offer()
        assert [host for host, _ in offer.addresses] == ["127.0.0.1", "127.0.0.2"]
        with tcp.connect(offer, seconds=SECONDS, nic=1) as peer:
            assert peer.name == f"rank 0 at 127.0.0.2:{offer.addresses[1][1]}"


def test_the_region_object_may_go_first(server: PeerServer, region: HostRegion, tcp: PeerTransport, shm: PeerTransport) -> None:
    region.close()
    assert readable(server.offer(), tcp)
    assert readable(server.offer(), shm)


def test_what_cannot_be_added(region: HostRegion) -> None:
    server = PeerServer("rank 0", ["127.0.0.1"])
    server.close()
    server.close()
    with pytest.raises(SettingsError, match="closed"):
        server.add(region)
    region.close()
    with pytest.raises(CheckpointError, match="closed"):
        server.add(region)


def test_removing_twice(server: PeerServer) -> None:
    (offer,) = server.offer().regions
    server.remove(offer, seconds=SECONDS)
    server.remove(offer, seconds=SECONDS)
    assert server.offer().regions == ()


def test_removal_waits_for_the_last_reader(server: PeerServer, tcp: PeerTransport) -> None:
    offer = server.offer()
    gone = threading.Event()
    with lease(offer), lease(offer):
        remover = threading.Thread(target=lambda: (server.remove(offer.regions[0], seconds=SECONDS), gone.set()))
        remover.start()
        until(lambda: not server.offer().regions)  # nobody new gets in
        with pytest.raises(TransferError, match="not served any more"):
            tcp.connect(offer, seconds=SECONDS)
        assert not gone.is_set()
    remover.join(SECONDS)
    assert gone.is_set()


# --- strangers --------------------------------------------------------------------------------------------------------


NONSENSE = {
    "http": b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    "another version": PREAMBLE.pack(MAGIC, VERSION + 1),
    "a huge frame": PREAMBLE.pack(MAGIC, VERSION) + LENGTH.pack(1 << 31),
    "no message": PREAMBLE.pack(MAGIC, VERSION) + LENGTH.pack(4) + b"\xc1\xff\x00\x01",
    "a read without a greeting": PREAMBLE.pack(MAGIC, VERSION)
    + LENGTH.pack(len(msgspec.msgpack.encode(Fetch(0, 0, 9))))
    + msgspec.msgpack.encode(Fetch(0, 0, 9)),
    "nothing at all": b"",
}


@pytest.mark.parametrize("words", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_gets_nothing(region: HostRegion, tcp: PeerTransport, words: bytes) -> None:
    with PeerServer("rank 0", ["127.0.0.1"], limits=LIMITS) as server:
        server.add(region)
        with socket.create_connection(server.offer().addresses[0], SECONDS) as stranger:
            stranger.sendall(words)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while more := stranger.recv(1 << 16):  # ends by the server's deadline
                    answer += more
        assert len(answer) < 300
        assert content(0, 2 * MIB)[:9] not in answer
        assert readable(server.offer(), tcp)


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, -1), (2 * MIB, 1), (1, 2 * MIB), (1 << 62, 1 << 62)])
def test_reads_outside_the_region_are_refused(server: PeerServer, offset: int, nbytes: int) -> None:
    """By the source, whatever the reader checked before it asked."""
    with lease(server.offer()) as wire:
        wire.send(Fetch(0, offset, nbytes), Deadline.after(SECONDS), "fetch")
        assert "are not in its 2097152 bytes" in str(wire.receive(Deadline.after(SECONDS), "fetch"))


def test_a_region_must_be_opened(server: PeerServer) -> None:
    offer = server.offer()
    with lease(msgspec.structs.replace(offer, regions=())) as wire:
        wire.send(Fetch(0, 0, 1), Deadline.after(SECONDS), "fetch")
        assert "it was not opened" in str(wire.receive(Deadline.after(SECONDS), "fetch"))


def test_a_transport_that_is_not_offered(region: HostRegion, shm: PeerTransport) -> None:
    with PeerServer("rank 0", ["127.0.0.1"]) as server:
        server.add(region)
        with pytest.raises(TransferError, match=r"rank 0 at .*, stage open, region 0: it does not offer shm"):
            shm.connect(server.offer(), seconds=SECONDS)


def test_no_more_connections_than_allowed(region: HostRegion, tcp: PeerTransport) -> None:
    with PeerServer("rank 0", ["127.0.0.1"], limits=ServerLimits(connections=2)) as server:
        server.add(region)
        offer = server.offer()
        with lease(offer), lease(offer), pytest.raises(PeerLostError, match="source"):
            lease(offer)

        def again() -> bool:  # the places are free when the server has seen the readers leave
            with contextlib.suppress(PeerLostError):
                return readable(offer, tcp)
            return False

        until(again)


# --- leases that end --------------------------------------------------------------------------------------------------


def test_an_idle_lease_ends_and_what_follows_fails(region: HostRegion, tcp: PeerTransport) -> None:
    with PeerServer("rank 0", ["127.0.0.1"], limits=LIMITS) as server:
        server.add(region)
        offer = server.offer()
        memory = torch.zeros(2 * MIB, dtype=torch.uint8)
        with tcp.connect(offer, seconds=SECONDS) as peer:
            server.remove(offer.regions[0], seconds=SECONDS)  # the reader sleeps for longer than LIMITS.idle
            with pytest.raises(PeerLostError, match="rank 0 at"):
                peer.submit_read(tcp.register(memory), [ReadOp(0, 0, 2 * MIB, 0)], seconds=SECONDS).wait()


@pytest.mark.parametrize("kind", ["tcp", "shm"])
def test_bytes_that_came_do_not_count_when_the_lease_had_ended(region: HostRegion, kind: str) -> None:
    """The source gives up a reader that does not answer, and its memory gets other bytes. What the reader asked for is in the
    sockets' buffers, or in the memory that it has open, and would still come: it must not take it for what was offered."""
    limits = ServerLimits(idle=0.2, stalled=0.2)
    with (
        open_transport(kind, PeerOptions(connections=1, piece_bytes=1 << 12)) as transport,
        PeerServer("rank 0", ["127.0.0.1"], [transport], limits=limits) as server,
    ):
        server.add(region)
        offer = server.offer()
        destination = transport.register(torch.zeros(1 << 12, dtype=torch.uint8))
        with transport.connect(offer, seconds=SECONDS) as peer, _held_up(kind) as go_on:
            read = peer.submit_read(destination, [ReadOp(0, 0, 1 << 12, 0)], seconds=SECONDS)
            server.remove(offer.regions[0], seconds=SECONDS)
            region.view(0, 2 * MIB)[:] = bytes(2 * MIB)
            go_on.set()
            with pytest.raises(PeerLostError, match="rank 0 at"):
                read.wait()
            assert read.cancel() is Outcome.QUIESCED
        if kind == "shm":
            assert not destination.tensor.any()  # they did come, and were others by then


@contextlib.contextmanager
def _held_up(kind: str) -> Iterator[threading.Event]:
    """The reader's lane rests between asking and taking (tcp), or before taking (shm), as a stopped process would."""
    from checkpoint_engine.transport.peer import shm, tcp

    owner, name = (tcp.TcpLane, "_take_answer") if kind == "tcp" else (shm.ShmMover, "start")
    going = threading.Event()
    original = getattr(owner, name)

    def slow(self: object, *args: object) -> object:
        going.wait(SECONDS)
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, slow)
        yield going
        going.set()


# --- a source that is none --------------------------------------------------------------------------------------------


@pytest.fixture
def impostor() -> Iterator[Callable[[bytes], PeerOffer]]:
    """A server that says what it is told to, whatever it hears, and then listens."""
    with socket.create_server(("127.0.0.1", 0)) as door, contextlib.ExitStack() as stack:

        def speak(words: bytes) -> None:
            with contextlib.suppress(OSError):
                sock = stack.enter_context(door.accept()[0])
                sock.sendall(words)
                while sock.recv(1 << 16):
                    pass

        threads: list[threading.Thread] = []

        def say(words: bytes) -> PeerOffer:
            threads.append(threading.Thread(target=speak, args=(words,), daemon=True))
            threads[-1].start()
            return PeerOffer("rank 9", (door.getsockname(),), "t", "", ("tcp",), (RegionOffer(0, 1, 10),))

        yield say
        door.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(SECONDS)


FALSE = {
    "http": (b"HTTP/1.1 400 Bad Request\r\n\r\n", ProtocolError, "does not speak this protocol"),
    "another version": (PREAMBLE.pack(MAGIC, 99), ProtocolError, "speaks version 99"),
    "a huge frame": (PREAMBLE.pack(MAGIC, VERSION) + LENGTH.pack(FROM_SOURCE + 1), ProtocolError, "is the limit"),
    "no message": (PREAMBLE.pack(MAGIC, VERSION) + LENGTH.pack(1) + b"\xc1", ProtocolError, "not a message"),
    "out of turn": (
        PREAMBLE.pack(MAGIC, VERSION) + struct.pack("<I", 12) + msgspec.msgpack.encode(["Confirmed"])[:12].ljust(12, b"\0"),
        ProtocolError,
        "out of turn|not a message",
    ),
    "nothing": (b"", DeadlineError, "stage connect"),
}


@pytest.mark.parametrize(("words", "kind", "reason"), FALSE.values(), ids=FALSE)
def test_a_false_source(
    impostor: Callable[[bytes], PeerOffer], tcp: PeerTransport, words: bytes, kind: type[CheckpointEngineError], reason: str
) -> None:
    with pytest.raises(kind, match=reason) as raised:
        tcp.connect(impostor(words), seconds=0.5)
    assert "rank 9 at 127.0.0.1:" in str(raised.value)


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_choose(server: PeerServer) -> None:
    offer = server.offer()
    assert choose(offer, whereabouts(), ["mooncake"]) == "shm"
    far = msgspec.structs.replace(offer, whereabouts="elsewhere")
    assert choose(far, whereabouts(), []) == "tcp"
    assert choose(far, whereabouts(), ["mooncake"]) == "tcp"  # not offered
    assert choose(msgspec.structs.replace(far, transports=("tcp", "mooncake")), whereabouts(), ["nixl", "mooncake"]) == "mooncake"


def test_unknown_and_impossible() -> None:
    with pytest.raises(SettingsError, match="no peer transport 'carrier pigeon'; there are tcp, shm, mooncake, nixl"):
        open_transport("carrier pigeon")
    with pytest.raises(SettingsError, match="at least 1"):
        PeerOptions(connections=0)


def test_shm_from_another_host(server: PeerServer, shm: PeerTransport) -> None:
    far = msgspec.structs.replace(server.offer(), whereabouts="elsewhere")
    with pytest.raises(TransferError, match=r"rank 3 \(here\), stage connect: not on this host"):
        shm.connect(far, seconds=SECONDS)
