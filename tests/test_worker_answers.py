"""What a worker answers that it must not: the update fails, says what and of which rank's worker it was, and commits nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from checkpoint_engine.errors import UpdateError
from checkpoint_engine.planning.slices import Slice, Taken
from checkpoint_engine.server import ParameterServer
from checkpoint_engine.transport import messages as m
from checkpoint_engine.transport.channel import Channel
from checkpoint_engine.transport.session import ServerChannel, connect
from helpers.fleet import Handles, quick, tensors

Answer = Callable[[ServerChannel, int], None]
"""After the last of so many buckets was loaded."""


def _worker(answer: Answer, seen: list[object]) -> Callable[[Handles], None]:
    """Loads all buckets, and then answers like that. seen: what the server says to it."""

    def ask(handles: Handles) -> None:
        with connect(handles[0][1], 5) as channel:
            channel.send(m.Hello(1, "CPU", None, False, ()), seconds=5)
            count = 0
            while not isinstance(message := channel.receive(seconds=10), m.Release):
                if isinstance(message, m.Load):
                    count += 1
                    channel.send(m.Loaded(message.bucket, 0.0, 0.0), seconds=5)
            answer(channel, count)
            seen.append(channel.receive(seconds=10))

    return ask


def _ready(**told: bytes) -> Answer:
    return lambda channel, _: channel.send(m.Ready(0.0, **told), seconds=5)


def _loads_one_more(channel: Channel[object], count: int) -> None:
    channel.send(m.Loaded(count, 0.0, 0.0), seconds=5)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (_loads_one_more, r"the worker loaded bucket (\d+) of \1"),
        (_ready(needs=b"\xff" * 100), "the worker says what it needs of .+: 100 bytes are not"),
        (_ready(sums=b"12345678"), "rank 0 told 8 bytes of sums of slices"),
        (_ready(taken=Taken(((Slice(0, 1),),)).encode()), "the worker of rank 0 .+: slices of 1 tensors, and there are"),
        (_ready(taken=b"nonsense"), "the worker of rank 0 .+: no description of slices"),
    ],
    ids=["a bucket too many", "needs", "sums", "taken", "nonsense"],
)
def test_an_answer_that_fits_nothing(answer: Answer, words: str) -> None:
    seen: list[object] = []
    with ParameterServer(rank=0, world_size=1, settings=quick(bucket_bytes=64 << 10, map_regions=False, verify="on")) as ps:
        ps.register_checkpoint("c", named_tensors=tensors(1))
        ps.gather_metas("c")
        with pytest.raises(UpdateError, match=words) as caught:
            ps.update("c", _worker(answer, seen))
    assert not caught.value.committed
    assert not any(isinstance(message, m.Commit) for message in seen)
