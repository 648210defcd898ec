"""The peer protocol: a hostile reader gets nothing but what is served, a hostile source writes nothing but what was asked for."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.errors import CheckpointEngineError, DeadlineError, PeerLostError, ProtocolError
from checkpoint_engine.memory.region import HostRegion
from checkpoint_engine.transport.messages import Message
from checkpoint_engine.transport.peer.base import Deadline, PeerOffer, PeerOptions, ReadOp, RegionOffer, open_transport
from checkpoint_engine.transport.peer.server import PeerServer
from checkpoint_engine.transport.peer.wire import (
    FROM_READER,
    FROM_SOURCE,
    LENGTH,
    MAGIC,
    PREAMBLE,
    VERSION,
    Bytes,
    Confirm,
    Confirmed,
    Fetch,
    FromReader,
    FromSource,
    Hello,
    Open,
    Opened,
    Refused,
    Welcome,
    Wire,
)
from helpers.damage import INTEGERS, damaged, misshapen, nested
from helpers.fuzzing import fuzz

PREFACE = PREAMBLE.pack(MAGIC, VERSION)
SIZE = 5000
SERVED = random.Random(0).randbytes(SIZE)
SECRET = bytes([0xEE]) * SIZE  # what no reader may ever see: it lies in a region that is not offered
SECONDS = 20.0


def frame(message: Any) -> bytes:
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body


def tree(message: Message) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message))


def heard(incoming: Any, limit: int, data: bytes) -> CheckpointEngineError:
    """How the conversation ends with a peer that says `data` and no more."""
    ours, theirs = _tcp_pair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        deadline = Deadline.after(SECONDS)
        try:
            with Wire(ours, "the peer", incoming, limit, deadline) as wire:
                while True:
                    assert isinstance(wire.receive(deadline, "test"), incoming)
        except CheckpointEngineError as e:
            return e


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as door:
        ours = socket.create_connection(door.getsockname())
        theirs, _ = door.accept()
    for sock in (ours, theirs):  # leave no port in TIME_WAIT
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return ours, theirs


REQUESTS = (Hello("token", "me"), Open(0, 1, "tcp"), Fetch(0, 10, 20), Confirm())
ANSWERS = (Welcome(), Opened(0, b"ticket"), Bytes(20), Confirmed(), Refused("open", 0, "no", True))
SIDES = st.sampled_from([(FromReader, FROM_READER, REQUESTS), (FromSource, FROM_SOURCE, ANSWERS)])


@fuzz
@given(SIDES, st.data())
def test_frames(side: tuple[Any, int, tuple[Message, ...]], data: st.DataObject) -> None:
    incoming, limit, messages = side
    stream = PREFACE + b"".join(map(frame, messages))
    if data.draw(st.booleans()):
        stream = data.draw(damaged(stream, most=6))
    else:
        stream = PREFACE + b"".join(frame(data.draw(misshapen(tree(m), most=1))) for m in messages)
    error = heard(incoming, limit, stream)
    assert isinstance(error, PeerLostError | ProtocolError) and "the peer" in str(error)


@pytest.mark.parametrize("message", [*REQUESTS, *ANSWERS], ids=lambda message: type(message).__name__)
def test_what_is_nested_too_deeply(message: Message) -> None:
    incoming, limit = (FromReader, FROM_READER) if message in REQUESTS else (FromSource, FROM_SOURCE)
    body = nested(message, limit - 100)
    error = heard(incoming, limit, PREFACE + LENGTH.pack(len(body)) + body)
    assert isinstance(error, PeerLostError | ProtocolError)  # the reader's limit lets through what some Pythons can follow


# A hostile reader


@pytest.fixture(scope="module")
def source() -> Iterator[tuple[PeerServer, PeerOffer]]:
    with HostRegion(SIZE) as region, HostRegion(SIZE) as hidden, PeerServer("source", ["127.0.0.1"]) as server:
        region.view(0, SIZE)[:] = SERVED
        hidden.view(0, SIZE)[:] = SECRET
        server.add(region)
        yield server, server.offer()


NUMBERS = st.one_of(st.integers(-2, SIZE + 2), INTEGERS.filter(lambda n: -(2**63) <= n < 2**64))


@fuzz
@given(st.data())
def test_a_source_tells_a_reader_nothing_but_what_it_serves(source: tuple[PeerServer, PeerOffer], data: st.DataObject) -> None:
    server, offer = source
    region = offer.regions[0]
    asked = [Hello(offer.token, "fuzz"), Open(region.region, region.generation, "tcp")]
    asked += data.draw(
        st.lists(st.one_of(st.builds(Fetch, st.just(region.region), NUMBERS, NUMBERS), st.just(Confirm())), max_size=3)
    )
    frames = [frame(data.draw(misshapen(tree(m), most=1)) if data.draw(st.integers(0, 3)) == 0 else m) for m in asked]
    stream = PREFACE + b"".join(frames)
    if data.draw(st.integers(0, 3)) == 0:
        stream = data.draw(damaged(stream))
    got = said_by(offer.addresses[0], stream)
    known = offer.token.encode() in stream
    assert got[: PREAMBLE.size] == PREFACE[: len(got)]
    rest = memoryview(got)[PREAMBLE.size :]
    decoder = msgspec.msgpack.Decoder(FromSource)
    while rest:
        length = int.from_bytes(rest[:4], "little")
        if len(rest) < 4 + length:  # cut off, as it hung up with something of ours unread
            break
        answer, rest = decoder.decode(rest[4 : 4 + length]), rest[4 + length :]
        assert known or isinstance(answer, Refused), "without the token there is no answer"
        if isinstance(answer, Bytes):
            assert 0 <= answer.nbytes <= SIZE and bytes(rest[: answer.nbytes]) in SERVED
            rest = rest[answer.nbytes :]
    assert server.offer() == offer, "it goes on serving"


def said_by(address: tuple[str, int], stream: bytes) -> bytes:
    """All that the source answers until it ends the connection, or knows that no more will come."""
    got = bytearray()
    with socket.create_connection(address, timeout=SECONDS) as sock:
        try:
            sock.sendall(stream)
            sock.shutdown(socket.SHUT_WR)
            while more := sock.recv(1 << 16):
                got += more
        except TimeoutError:
            raise
        except OSError:  # it hung up with something of ours unread
            pass
    return bytes(got)


# A hostile source


@fuzz
@given(st.data())
def test_a_source_writes_nothing_but_what_was_asked_for(hostile: Hostile, data: st.DataObject) -> None:
    """Whatever it answers, memory around the destination stays as it is, and the read is done or raises a typed error."""
    op = ReadOp(0, 10, data.draw(st.integers(1, 300)), data.draw(st.integers(0, 100)))
    content = SERVED[10 : 10 + op.nbytes]
    honest: list[bytes] = [frame(m) for m in (Welcome(), Opened(0, b""), Bytes(op.nbytes))] + [content, frame(Confirmed())]
    said = list(honest)
    if data.draw(st.booleans()):
        which = data.draw(st.integers(0, 3))
        answer = data.draw(st.one_of(misshapen(tree(ANSWERS[which])), st.builds(lambda n: tree(Bytes(n)), NUMBERS)))
        said[which] = frame(answer)
    else:
        said[0:0] = [PREFACE]
        said = [data.draw(damaged(b"".join(said)))]
    stream = b"".join(said)
    hostile.stream = stream if stream.startswith(PREFACE) or len(said) == 1 else PREFACE + stream
    guard = torch.full((1000,), 0xAB, dtype=torch.uint8)
    before = guard.clone()
    error: CheckpointEngineError | None = None
    with open_transport("tcp", PeerOptions(connections=1)) as transport:
        destination = transport.register(guard[300:700])
        try:
            with transport.connect(hostile.offer, seconds=SECONDS) as peer:
                peer.submit_read(destination, [op], seconds=SECONDS).wait()
        except CheckpointEngineError as e:
            error = e
        transport.unregister(destination)
    assert not isinstance(error, DeadlineError), "a source that hung up is not waited for"
    inside = slice(300 + op.target, 300 + op.target + op.nbytes)
    before[inside] = guard[inside]
    assert torch.equal(before, guard)
    if hostile.stream == PREFACE + b"".join(honest):
        assert error is None and bytes(guard[inside].tolist()) == content


class Hostile:
    """A source that says `stream` to whoever connects, and hangs up."""

    def __init__(self) -> None:
        self.stream = b""
        self._door = socket.create_server(("127.0.0.1", 0))
        host, port = self._door.getsockname()
        self.offer = PeerOffer("hostile", ((host, port),), "token", "elsewhere", ("tcp",), (RegionOffer(0, 1, SIZE),))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._door.accept()
            except OSError:
                return
            with sock:
                sock.settimeout(SECONDS)
                try:
                    sock.sendall(self.stream)
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(1 << 16):
                        pass
                except OSError:
                    pass

    def close(self) -> None:
        self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        self._thread.join(SECONDS)


@pytest.fixture(scope="module")
def hostile() -> Iterator[Hostile]:
    source = Hostile()
    yield source
    source.close()
