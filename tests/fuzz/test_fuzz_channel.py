"""What arrives on a channel, and what a worker makes of tables: messages or a typed error, and no byte outside of the memory."""

from __future__ import annotations

import itertools
import socket
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from checkpoint_engine.devices.base import SharedHandle
from checkpoint_engine.errors import CheckpointEngineError, DeadlineError, PeerLostError, ProtocolError
from checkpoint_engine.planning.plan import Item
from checkpoint_engine.transport.channel import LENGTH, MAGIC, PREAMBLE, Channel
from checkpoint_engine.transport.messages import (
    PROTOCOL,
    Abort,
    Attach,
    Begin,
    Commit,
    Failed,
    Failure,
    FromServer,
    FromWorker,
    Give,
    Given,
    Hello,
    Introduce,
    Load,
    Loaded,
    Message,
    OverLink,
    Ready,
    Release,
    Slicing,
    Table,
)
from checkpoint_engine.worker.views import Views
from helpers.damage import INTEGERS, damaged, misshapen, nested
from helpers.fuzzing import fuzz

TABLE = Table(256, 512, (Item("layers.0.w", "bfloat16", (3, 4), 0, 24), Item("b", "float32", (8,), 256, 32)))
MESSAGES: dict[Any, tuple[Message, ...]] = {
    FromServer: (
        Attach(0, (SharedHandle("memfd", 9),), "p", (TABLE,), slicing=Slicing(("x",), b"\x03", True)),
        Load(1),
        Release(),
        Commit("v"),
        Abort("no"),
    ),
    FromWorker: (
        Hello(1, "GPU", None, False, ("p",), ("x",)),
        Loaded(0, 0.5, 0.25),
        Ready(0.5, sums=b"12345678", taken=b"x"),
        Failed("load", 3, "why", True),
    ),
    OverLink: (
        Introduce(1, b"secret"),
        Give(1, "a", b"x"),
        Given(1, (b"x", b"y")),
        Begin(1, 0, (0, 1)),
        Failure(1, 0, "h", "s", "r"),
    ),
}
KINDS = st.sampled_from(list(MESSAGES))
HELLO = PREAMBLE.pack(MAGIC, PROTOCOL)


def frame(body: bytes) -> bytes:
    return LENGTH.pack(len(body)) + body


def received(incoming: Any, data: bytes, cuts: list[int]) -> tuple[list[Any], CheckpointEngineError]:
    """What a channel makes of `data`, which arrives in pieces and is all that the peer ever says."""
    ours, theirs = socket.socketpair()
    messages: list[Any] = []
    edges = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    with ours, theirs:
        try:
            theirs.sendall(pieces.pop(0) if pieces else b"")
            if not pieces:
                theirs.shutdown(socket.SHUT_WR)
            with Channel(ours, "the peer", incoming, 5) as channel:
                channel.limit = 1 << 16
                for piece in pieces:
                    theirs.sendall(piece)
                    messages += channel.drain()
                theirs.shutdown(socket.SHUT_WR)
                while True:
                    messages.append(channel.receive(seconds=5))
        except CheckpointEngineError as e:
            return messages, e


def check(incoming: Any, messages: list[Any], error: CheckpointEngineError) -> None:
    assert isinstance(error, PeerLostError | ProtocolError | DeadlineError)
    assert "the peer" in str(error)
    for message in messages:
        assert isinstance(message, incoming), "nothing of another type gets through"


@fuzz
@given(KINDS, st.data())
def test_a_stream_of_damaged_bytes(incoming: Any, data: st.DataObject) -> None:
    stream = HELLO + b"".join(frame(msgspec.msgpack.encode(m)) for m in MESSAGES[incoming])
    cuts = data.draw(st.lists(st.integers(PREAMBLE.size, len(stream)), max_size=2))
    check(incoming, *received(incoming, data.draw(damaged(stream, most=6)), cuts))


@fuzz
@given(KINDS, st.data())
def test_whole_frames_of_another_structure(incoming: Any, data: st.DataObject) -> None:
    """Everything up to the first that is no message gets through, and nothing behind it."""
    trees = [msgspec.msgpack.decode(msgspec.msgpack.encode(m)) for m in data.draw(st.permutations(MESSAGES[incoming]))]
    bodies = [msgspec.msgpack.encode(data.draw(misshapen(tree, most=1))) for tree in trees]
    good = []
    for body in bodies:
        try:
            good.append(msgspec.msgpack.decode(body, type=incoming))
        except msgspec.MsgspecError:
            break
    messages, error = received(incoming, HELLO + b"".join(map(frame, bodies)), [])
    check(incoming, messages, error)
    assert msgspec.msgpack.encode(messages) == msgspec.msgpack.encode(good)  # not ==: NaN
    assert isinstance(error, PeerLostError if len(good) == len(bodies) else ProtocolError)


@fuzz
@given(st.binary(max_size=60), KINDS)
def test_anything_at_all(data: bytes, incoming: Any) -> None:
    check(incoming, *received(incoming, data, []))
    check(incoming, *received(incoming, HELLO + data, [PREAMBLE.size]))


ITEMS = st.builds(
    Item,
    name=st.just("w"),
    dtype=st.sampled_from(["float32", "bfloat16", "uint8", "complex128", "load", "Tensor", "no such", "__class__", "", "bits8"]),
    shape=st.lists(INTEGERS, max_size=3).map(tuple),
    offset=st.one_of(INTEGERS, st.integers(0, 1024)),
    nbytes=st.one_of(INTEGERS, st.integers(0, 1024)),
    memory=st.integers(-2, 2),
)


@fuzz
@example(Table(0, 0, (Item("w", "float32", (), 1, -(2**62) - 2),)))
@given(st.builds(Table, offset=st.one_of(st.just(0), INTEGERS), nbytes=INTEGERS, items=st.tuples(ITEMS)))
def test_tables_show_no_byte_outside_of_the_memory(table: Table) -> None:
    """Whatever is raised, the session says Failed with it; what must not happen is a view that leaves the memory."""
    whole = torch.zeros(4096, dtype=torch.uint8)
    memory = torch.frombuffer(whole.numpy().data[1024:2048], dtype=torch.uint8)
    try:
        ((_, view),) = Views([memory]).of(table)
    except (RuntimeError, IndexError, AttributeError, TypeError, ValueError, OverflowError, UserWarning):  # torch warns of some
        return
    if view.numel() and view.untyped_storage().data_ptr() == memory.data_ptr():
        reach = sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True)) + 1
        start = view.data_ptr() - memory.data_ptr()
        assert start >= 0 and start + reach * view.element_size() <= 1024


@pytest.mark.parametrize("incoming", list(MESSAGES))
def test_what_is_nested_too_deeply(incoming: Any) -> None:
    for message in MESSAGES[incoming]:
        messages, error = received(incoming, HELLO + frame(nested(message, 60_000)), [])
        assert (messages, type(error)) == ([], ProtocolError)


def test_a_frame_over_the_limit_takes_no_memory() -> None:
    messages, error = received(FromServer, HELLO + LENGTH.pack(2**32 - 1) + b"x", [])
    assert messages == [] and isinstance(error, ProtocolError)
    with pytest.raises(ProtocolError, match="is the limit"):
        raise error
