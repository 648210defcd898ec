"""What every peer transport does: the right bytes, or a typed error with the peer's name by the deadline, and no late write."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineError,
    PeerLostError,
    QuarantineError,
    RegionGoneError,
    SettingsError,
    TransferError,
)
from checkpoint_engine.transport.peer.base import (
    IMPLEMENTATIONS,
    Outcome,
    Peer,
    PeerOptions,
    PeerTransport,
    ReadOp,
    open_transport,
)
from checkpoint_engine.transport.peer.reading import quarantined_bytes
from helpers.peers import Source, content
from helpers.ports import free_ports

MIB = 1 << 20
SIZES = (1, 4095, 70_000, 3 * MIB + 17, 32 * MIB)
SMALL, LARGE = 3, 4  # numbers of regions
ENGINES = ("mooncake", "nixl")
LONG = 256
"""How often the large region is read, so that no reader is done before its source is stopped or killed: 8 GiB."""
SECONDS = 20.0
SLACK = 8.0
"""How much later than its deadline an error may come here: two busy cores, and a grace of 2 s for lanes to end."""


@pytest.fixture(scope="module", params=sorted(IMPLEMENTATIONS))
def transport(request: pytest.FixtureRequest) -> Iterator[PeerTransport]:
    try:
        made = open_transport(request.param, PeerOptions(piece_bytes=1 * MIB))
    except SettingsError as e:
        pytest.skip(str(e))
    with made:
        yield made


@pytest.fixture(scope="module")
def shared_source(transport: PeerTransport) -> Iterator[Source]:
    with Source(SIZES, [transport.kind]) as made:
        yield made


@pytest.fixture
def source(shared_source: Source) -> Iterator[Source]:
    """One for all tests; it may be stopped, and goes on after the test."""
    yield shared_source
    shared_source.resume()


@pytest.fixture
def mortal(transport: PeerTransport) -> Iterator[Source]:
    """One to be killed."""
    with Source(SIZES, [transport.kind]) as made:
        yield made


@pytest.fixture(scope="module")
def shared_peer(transport: PeerTransport, shared_source: Source) -> Iterator[Peer]:
    with transport.connect(shared_source.offer, seconds=SECONDS) as made:
        yield made


def read_all(transport: PeerTransport, source: Source, region: int = LARGE) -> bytes:
    offered = next(r for r in source.offer.regions if r.region == region)
    memory = torch.zeros(offered.nbytes, dtype=torch.uint8)
    destination = transport.register(memory)
    with transport.connect(source.offer, seconds=SECONDS) as peer:
        peer.submit_read(destination, [ReadOp(region, 0, offered.nbytes, 0)], seconds=SECONDS).wait()
    transport.unregister(destination)
    return bytes(memory.numpy())


@st.composite
def reads(draw: st.DrawFn) -> tuple[list[ReadOp], int]:
    """Ops whose targets do not overlap, in any order, with holes; and the size of the destination."""
    ops, at = [], draw(st.integers(0, 9))
    for _ in range(draw(st.integers(0, 6))):
        region = draw(st.integers(0, SMALL))
        offset = draw(st.integers(0, SIZES[region]))
        nbytes = draw(st.integers(0, SIZES[region] - offset))
        ops.append(ReadOp(region, offset, nbytes, at))
        at += nbytes + draw(st.integers(0, 70))
    return draw(st.permutations(ops)), at + 1


@settings(deadline=None, max_examples=40)
@given(reads(), st.integers(0, 63))
def test_every_byte_and_no_other(transport: PeerTransport, shared_peer: Peer, case: tuple[list[ReadOp], int], lead: int) -> None:
    ops, nbytes = case
    memory = torch.zeros(lead + nbytes, dtype=torch.uint8)
    destination = transport.register(memory[lead:])
    shared_peer.submit_read(destination, ops, seconds=SECONDS).wait()
    transport.unregister(destination)
    wanted = bytearray(lead + nbytes)
    for op in ops:
        part = content(op.region, SIZES[op.region])[op.offset : op.offset + op.nbytes]
        wanted[lead + op.target : lead + op.target + op.nbytes] = part
    assert bytes(memory.numpy()) == wanted


def test_many_reads_at_once(transport: PeerTransport, shared_peer: Peer) -> None:
    memory = torch.zeros(8 * SIZES[3], dtype=torch.uint8)
    destination = transport.register(memory)
    under_way = [shared_peer.submit_read(destination, [ReadOp(3, 0, SIZES[3], n * SIZES[3])], seconds=SECONDS) for n in range(8)]
    while not all(read.poll() for read in under_way):
        time.sleep(0.001)
    assert bytes(memory.numpy()) == 8 * content(3, SIZES[3])
    assert {read.cancel() for read in under_way} == {Outcome.QUIESCED}  # of what is over
    transport.unregister(destination)


def test_ops_that_leave_region_or_destination(transport: PeerTransport, shared_peer: Peer) -> None:
    destination = transport.register(torch.zeros(100, dtype=torch.uint8))
    for op in (ReadOp(1, 4000, 96, 0), ReadOp(1, -1, 5, 0), ReadOp(1, 0, 50, 51), ReadOp(1, 0, 5, -1), ReadOp(9, 0, 1, 0)):
        with pytest.raises(ValueError, match=r"region|destination"):
            shared_peer.submit_read(destination, [op], seconds=SECONDS)
    transport.unregister(destination)


def test_memory_in_use_is_not_unregistered(transport: PeerTransport, source: Source) -> None:
    destination = transport.register(torch.zeros(100, dtype=torch.uint8))
    with transport.connect(source.offer, seconds=SECONDS) as peer:
        source.stop()
        read = peer.submit_read(destination, [ReadOp(SMALL, 0, 100, 0)], seconds=SECONDS)
        with pytest.raises(TransferError, match="a read into this memory goes on"):
            transport.unregister(destination)
        source.resume()
        read.wait()
    transport.unregister(destination)


# --- sources that are not what they were ------------------------------------------------------------------------------


def test_a_region_that_is_gone(transport: PeerTransport, source: Source) -> None:
    source.tell("add 1000")
    old = source.offer
    number = old.regions[-1].region
    source.tell(f"remove {number} 10")
    with pytest.raises(RegionGoneError, match=rf"{source.name} at .*stage open, region {number}: it is not served any more"):
        transport.connect(old, seconds=SECONDS)


def test_a_region_that_was_replaced(transport: PeerTransport, source: Source) -> None:
    """As after a restart: number and size are the same, the bytes need not be."""
    old = source.offer
    region = old.regions[SMALL]
    other = msgspec.structs.replace(region, generation=region.generation ^ 1)
    with pytest.raises(RegionGoneError, match=rf"{source.name} .*another region is served in its place") as raised:
        transport.connect(msgspec.structs.replace(old, regions=(other,)), seconds=SECONDS)
    assert raised.value.region == SMALL


def test_the_wrong_token(transport: PeerTransport, source: Source) -> None:
    with pytest.raises(TransferError, match=f"{source.name} .*token"):
        transport.connect(msgspec.structs.replace(source.offer, token="guess"), seconds=SECONDS)


def test_a_port_that_is_closed(transport: PeerTransport, source: Source) -> None:
    closed = msgspec.structs.replace(source.offer, addresses=(("127.0.0.1", free_ports(1)),))
    with pytest.raises(PeerLostError, match=f"{source.name} at 127.0.0.1:"):
        transport.connect(closed, seconds=SECONDS)


def test_an_address_where_nobody_answers(transport: PeerTransport, source: Source) -> None:
    """A stopped process: its kernel takes the connection, and then nothing comes."""
    source.stop()
    before = time.monotonic()
    with pytest.raises(DeadlineError, match=f"{source.name} at .*stage connect"):
        transport.connect(source.offer, seconds=0.3)
    assert time.monotonic() - before < 0.3 + SLACK


def test_a_source_that_was_killed(transport: PeerTransport, mortal: Source, source: Source) -> None:
    destination = transport.register(torch.zeros(100, dtype=torch.uint8))
    with transport.connect(mortal.offer, seconds=SECONDS) as peer:
        mortal.kill()
        with pytest.raises(CheckpointEngineError, match=mortal.name) as raised:
            peer.submit_read(destination, [ReadOp(SMALL, 0, 100, 0)], seconds=SECONDS).wait()
        assert isinstance(raised.value, (PeerLostError, TransferError))
        with pytest.raises(TransferError, match=f"{mortal.name}.*the connection has failed|may still write"):
            peer.submit_read(destination, [ReadOp(SMALL, 0, 100, 0)], seconds=SECONDS)
    assert read_all(transport, source) == content(LARGE, SIZES[LARGE])  # another holder of the same bytes


def test_a_source_killed_half_way(transport: PeerTransport, mortal: Source) -> None:
    memory = torch.zeros(SIZES[LARGE], dtype=torch.uint8)
    destination = transport.register(memory)
    with transport.connect(mortal.offer, seconds=SECONDS) as peer:
        read = peer.submit_read(destination, [ReadOp(LARGE, 0, SIZES[LARGE], 0)] * LONG, seconds=SECONDS)
        while not memory[0]:
            assert not read.poll()
        mortal.kill()
        with pytest.raises(CheckpointEngineError, match=mortal.name):
            read.wait()
        assert read.failed


# --- late writes ------------------------------------------------------------------------------------------------------


def test_nothing_is_written_late(transport: PeerTransport, source: Source) -> None:
    """The source stops half way and the deadline passes. Either the memory is free, and then nothing that the source does later
    can be seen in it, or it cannot be used."""
    memory = torch.zeros(SIZES[LARGE], dtype=torch.uint8)
    destination = transport.register(memory)
    peer = transport.connect(source.offer, seconds=SECONDS)
    read = peer.submit_read(destination, [ReadOp(LARGE, 0, SIZES[LARGE], 0)] * LONG, seconds=2.0)
    while not memory[0]:
        assert not read.poll()
    source.stop()
    before = time.monotonic()
    with pytest.raises(DeadlineError, match=f"{source.name} at"):
        read.wait()
    assert time.monotonic() - before < 2.0 + SLACK

    outcome = read.cancel()
    assert (outcome is Outcome.QUIESCED) == read.settled == (not destination.quarantined)
    if transport.kind not in ENGINES:
        assert outcome is Outcome.QUIESCED
    if outcome is Outcome.QUIESCED:
        transport.unregister(destination)
        memory.zero_()
    else:
        assert quarantined_bytes() >= destination.nbytes
        with pytest.raises(QuarantineError, match=source.name):
            transport.unregister(destination)
        with pytest.raises(QuarantineError, match=source.name):
            peer.submit_read(destination, [ReadOp(0, 0, 1, 0)], seconds=SECONDS)
    source.resume()
    assert read_all(transport, source) == content(LARGE, SIZES[LARGE])  # it is at work again, and has sent what it would
    if outcome is Outcome.QUIESCED:
        assert not memory.any()
    peer.close()


def test_cancel_half_way(transport: PeerTransport, source: Source) -> None:
    memory = torch.zeros(SIZES[LARGE], dtype=torch.uint8)
    destination = transport.register(memory)
    with transport.connect(source.offer, seconds=SECONDS) as peer:
        read = peer.submit_read(destination, [ReadOp(LARGE, 0, SIZES[LARGE], 0)] * LONG, seconds=SECONDS)
        while not memory[0]:
            assert not read.poll()
        outcome = read.cancel()
        with pytest.raises(TransferError, match=f"{source.name}.*cancelled"):
            read.wait()
        if outcome is Outcome.QUIESCED:
            memory.zero_()
            assert read_all(transport, source) == content(LARGE, SIZES[LARGE])
            assert not memory.any()


# --- leases -----------------------------------------------------------------------------------------------------------


def test_a_region_is_not_given_up_under_a_reader(transport: PeerTransport, source: Source) -> None:
    source.tell("add 1000")
    number = source.offer.regions[-1].region
    destination = transport.register(torch.zeros(100, dtype=torch.uint8))
    with transport.connect(source.offer, seconds=SECONDS) as peer:
        refused = source.tell(f"remove {number} 0.05")
        assert refused.startswith("DeadlineError: gave up after 0.05 s waiting for process ")
        assert f"to stop reading region {number}" in refused
        peer.submit_read(destination, [ReadOp(number, 5, 100, 0)], seconds=SECONDS).wait()
    assert bytes(destination.tensor.numpy()) == content(number, 1000)[5:105]
    transport.unregister(destination)
    source.tell(f"remove {number} 10")  # waited for, should the source not have seen the reader leave yet
    assert number not in [region.region for region in source.offer.regions]


def test_only_what_was_opened_is_leased(transport: PeerTransport, source: Source) -> None:
    source.tell("add 1000")
    *others, last = source.offer.regions
    with transport.connect(source.offer, seconds=SECONDS, regions=others) as peer:
        source.tell(f"remove {last.region} 10")
        destination = transport.register(torch.zeros(10, dtype=torch.uint8))
        with pytest.raises(ValueError, match="it was not opened"):
            peer.submit_read(destination, [ReadOp(last.region, 0, 1, 0)], seconds=SECONDS)
        transport.unregister(destination)
    assert last.region not in [region.region for region in source.offer.regions]
