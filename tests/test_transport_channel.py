"""Framing: whatever arrives is a message or a typed error, by a deadline; descriptors travel beside messages."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.errors import CheckpointEngineError, DeadlineError, PeerLostError, ProtocolError
from checkpoint_engine.transport.channel import MAGIC, PREAMBLE, Channel
from checkpoint_engine.transport.messages import PROTOCOL, Commit, FromServer, FromWorker, Hello, Load, Loaded


def _pair() -> tuple[Channel[FromServer], Channel[FromWorker]]:
    ours, theirs = socket.socketpair()
    made: list[Channel[FromWorker]] = []
    other = threading.Thread(target=lambda: made.append(Channel(theirs, "worker", FromWorker, 5)))  # type: ignore[arg-type]
    other.start()
    channel: Channel[FromServer] = Channel(ours, "server", FromServer, 5)  # type: ignore[arg-type]
    other.join(5)
    return channel, made[0]


@pytest.fixture
def ends() -> Iterator[tuple[Channel[FromServer], Channel[FromWorker]]]:
    """(worker's end, server's end)."""
    worker, server = _pair()
    with worker, server:
        yield worker, server


def test_messages_in_order_both_ways(ends: tuple[Channel[FromServer], Channel[FromWorker]]) -> None:
    worker, server = ends
    for bucket in range(100):
        server.send(Load(bucket), seconds=5)
        worker.send(Loaded(bucket, 0.5, 0.25), seconds=5)
    assert [worker.receive(seconds=5) for _ in range(100)] == [Load(b) for b in range(100)]
    assert list(server.drain()) == [Loaded(b, 0.5, 0.25) for b in range(100)]


def test_a_large_message_passes_while_the_other_side_reads(ends: tuple[Channel[FromServer], Channel[FromWorker]]) -> None:
    worker, server = ends
    hello = Hello(1, "CPU", None, False, tuple("x" * 32 for _ in range(100_000)))
    sender = threading.Thread(target=lambda: worker.send(hello, seconds=10))
    sender.start()
    assert server.receive(seconds=10) == hello
    sender.join(5)


def test_descriptors_travel_beside_a_message(ends: tuple[Channel[FromServer], Channel[FromWorker]]) -> None:
    worker, server = ends
    with open(os.memfd_create("here"), "w+b") as file:
        file.write(b"over there")
        file.flush()
        server.send(Commit("v"), (file.fileno(),), seconds=5)
    assert worker.receive(seconds=5) == Commit("v")
    (descriptor,) = worker.take_descriptors()
    assert os.pread(descriptor, 100, 0) == b"over there"
    os.close(descriptor)
    assert worker.take_descriptors() == ()


def test_deadlines(ends: tuple[Channel[FromServer], Channel[FromWorker]]) -> None:
    worker, server = ends
    with pytest.raises(DeadlineError, match=r"gave up after 0.01 s waiting for a bucket from server"):
        worker.receive(seconds=0.01, waiting_for="a bucket")
    big = Commit("x" * (4 << 20))
    with pytest.raises(DeadlineError, match="worker to take a message"):
        server.send(big, seconds=0.05)


def test_a_blocked_sender_holds_up_no_other(ends: tuple[Channel[FromServer], Channel[FromWorker]]) -> None:
    """Another thread's message is on its way to a peer that reads nothing: the second has a deadline of its own."""
    _, server = ends
    blocked: list[type[BaseException]] = []

    def send() -> None:
        try:
            server.send(Commit("x" * (4 << 20)), seconds=60)
        except CheckpointEngineError as e:
            blocked.append(type(e))

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    while not server._sending.locked():
        sender.join(0.001)
    with pytest.raises(DeadlineError):
        server.send(Load(1), seconds=0.05)
    server.shutdown()
    sender.join(10)
    assert blocked == [PeerLostError]


def test_a_message_that_was_cut_off_ends_the_conversation(ends: tuple[Channel[FromServer], Channel[FromWorker]]) -> None:
    worker, server = ends
    with pytest.raises(DeadlineError):
        server.send(Commit("x" * (4 << 20)), seconds=0.05)
    with pytest.raises(PeerLostError):
        server.send(Load(1), seconds=5)
    with pytest.raises(PeerLostError):
        worker.receive(seconds=5)


def test_a_peer_is_not_believed_more_than_the_limit(ends: tuple[Channel[FromServer], Channel[FromWorker]]) -> None:
    worker, server = ends
    worker.limit = 100
    server.send(Commit("x" * 200), seconds=5)
    with pytest.raises(ProtocolError, match="100 is the limit"):
        worker.receive(seconds=5)


def test_a_peer_that_leaves(ends: tuple[Channel[FromServer], Channel[FromWorker]]) -> None:
    worker, server = ends
    server.send(Load(1), seconds=5)
    server.close()
    assert worker.receive(seconds=5) == Load(1), "what was sent before is still there"
    with pytest.raises(PeerLostError, match="server is gone"):
        worker.receive(seconds=5)
    with pytest.raises(PeerLostError):
        worker.send(Loaded(1, 0.0, 0.0), seconds=5)


def test_shutdown_wakes_who_waits(ends: tuple[Channel[FromServer], Channel[FromWorker]]) -> None:
    worker, _ = ends
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            worker.receive(seconds=30)
        except PeerLostError as e:
            errors.append(e)

    waiting = threading.Thread(target=wait)
    waiting.start()
    worker.shutdown()
    waiting.join(5)
    assert len(errors) == 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (b"HTTP/1.1 400 Bad Request", "does not speak this protocol"),
        (PREAMBLE.pack(MAGIC, PROTOCOL + 1), f"speaks protocol version {PROTOCOL + 1}, not {PROTOCOL}"),
    ],
)
def test_another_tongue(words: bytes, complaint: str) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(words)
        with pytest.raises(ProtocolError, match=complaint):
            Channel(ours, "someone", FromServer, 5)  # type: ignore[arg-type]
    assert ours.fileno() == -1, "the socket is closed"


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_messages_or_a_typed_error(data: bytes, framed: bool) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(PREAMBLE.pack(MAGIC, PROTOCOL) + (struct.pack("<I", len(data)) if framed else b"") + data)
        theirs.shutdown(socket.SHUT_WR)
        with Channel(ours, "someone", FromServer, 5) as channel, pytest.raises(CheckpointEngineError):  # type: ignore[arg-type]
            _receive_all(channel)


def _receive_all(channel: Channel[FromServer]) -> None:
    while True:
        assert isinstance(channel.receive(seconds=5), FromServer)
