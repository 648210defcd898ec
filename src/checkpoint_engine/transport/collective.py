"""How servers share what one of them lifted, and the communicators for it: never on the caller's process group, made once
and kept. Ranks of one host need none (`transport.push`)."""

from __future__ import annotations

import atexit
import ctypes
import datetime
import threading
import time
from abc import abstractmethod
from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from checkpoint_engine.devices.base import Closing, Device, Event, Stream
from checkpoint_engine.devices.spans import Spans
from checkpoint_engine.errors import DeadlineError, PeerLostError
from checkpoint_engine.settings import Settings

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

SLICE = 0.1
"""Seconds between two looks at whether a blocked broadcast has been abandoned."""


Ranks = Collection[int] | None
"""Who takes part in a broadcast, its root among them; None: all ranks."""

_unfinished: list[tuple[Any, Any]] = []
"""Abandoned gloo groups, each with the broadcast that is still in it."""


@atexit.register
def _forget() -> None:
    """The interpreter must not drop them at its end: that would wait."""
    for group, _ in _unfinished:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


class Collective(Closing):
    """One rank's part in sharing. All ranks make the same calls in the same order. After `abandon` it is good for nothing:
    make another.

    staged   an owner wants staging slots to lift into, from which it broadcasts; else it lifts straight into its ring
    in_step  after a failure all ranks must have made equally many calls before the next update (`server.level`)
    """

    staged = True
    in_step = True

    awaited = ""
    """Whom this rank's own broadcasts wait for, where that is known; for messages."""

    def __init__(self, seconds: float) -> None:
        """seconds: deadline of one broadcast. Whoever begins an update may set its own."""
        self.seconds = seconds
        self.spans = Spans()  # of all broadcasts on this rank, in their order; where not in_step, of its own alone

    def sent(self, ranks: Ranks) -> int:
        """How often a span of this rank's moves the bytes of a piece in which these take part."""
        return 1

    @abstractmethod
    def broadcast(
        self,
        target: torch.Tensor,
        source: torch.Tensor | None,
        root: int,
        stream: Stream,
        ready: Event | None,
        ranks: Ranks = None,
    ) -> Event:
        """Queue, in the end on `stream`: rank `root`'s `source` into the `target` of all `ranks`, the same place of their
        rings; both uint8, one-dimensional, of one length. Returns the event of its arrival on this rank, which is one of them.

        source: None on the other ranks, and on the root where `target` holds the bytes already. ready: on the root, the event
        from which on they do. What fails, or does not end in time, fails later events; neither tensor may be used then.
        """

    def skip(self, root: int) -> None:
        """In place of a broadcast from `root` in which this rank takes no part."""

    def check(self) -> None:
        """Raises DeviceError when broadcasts under way are known to have failed in a way that ends no event."""

    def rest(self) -> None:
        """Everything has arrived everywhere: let go of other ranks' rings, which may be freed next."""

    def quiet(self, stream: Stream, seconds: float) -> bool:
        """After a failure, before this rank says that it stopped: queue nothing further, and have nothing under way that
        writes to other ranks' rings. False when that was not to be had within `seconds`."""
        return True

    @abstractmethod
    def abandon(self, missing: Collection[int]) -> bool:
        """Give up on broadcasts that a dead rank holds up. missing: ranks that did not say that they stopped. True: they
        are over. False: this rank's memory may still be written by late arrivals, and whoever owns it must not use it
        again while this process lives."""


class StreamCollective(Collective):
    """One whose broadcasts are work in `stream` on every rank.

    groups: sub-groups of its ranks, which it owns, by their members in rising order: communicators of their own, in which a
    rank's number is its place among the members. members: of such a one, for messages. Broadcasts of all of them are queued in
    one order on one stream, so no two wait for each other.
    """

    memory = 0
    """Bytes of device memory that it takes as long as it lives, estimated."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.groups: dict[tuple[int, ...], StreamCollective] = {}
        self.members: tuple[int, ...] = ()

    def broadcast(
        self,
        target: torch.Tensor,
        source: torch.Tensor | None,
        root: int,
        stream: Stream,
        ready: Event | None,
        ranks: Ranks = None,
    ) -> Event:
        if ready is not None:
            stream.after(ready)
        start = stream.record()
        if ranks is None:
            self._queue(target, source, root, stream)
        elif len(ranks) > 1:
            members = tuple(ranks)
            self.groups[members]._queue(target, source, members.index(root), stream)
        elif source is not None:
            stream.copy(target, source)
        end = stream.record()
        self.spans.add(stream, start, end)
        return end

    def _name(self, root: int) -> str:
        return f"rank {self.members[root] if self.members else root}"

    def drop_groups(self) -> None:
        """Close them: nothing of them is under way."""
        for group in self.groups.values():
            group.close()
        self.groups = {}

    @abstractmethod
    def _queue(self, target: torch.Tensor, source: torch.Tensor | None, root: int, stream: Stream) -> None: ...


def join(device: Device, *, rank: int, world_size: int, store: Store, address: str, settings: Settings) -> StreamCollective:
    """Make the communicator that fits `device`; all ranks must call it.

    store     a prefix that no other communicator used
    address   of this rank's interface that the others reach
    settings  of which join_timeout is for all ranks to come, timeout for one broadcast

    Raises DeadlineError when the others do not come in time.
    """
    if device.backend == "gloo":
        return GlooCollective(rank, world_size, store, address, settings.join_timeout, settings.timeout)
    from checkpoint_engine.transport.nccl import NcclCollective

    return NcclCollective(device, rank, world_size, store, settings)


class GlooCollective(StreamCollective):
    """torch's gloo back end, used directly: no default group is needed, and no other group is touched."""

    def __init__(self, rank: int, world_size: int, store: Store, address: str, join_seconds: float, seconds: float) -> None:
        super().__init__(seconds)
        self.rank = rank
        self._abandoned = threading.Event()
        self._work: Any = None  # the last broadcast
        options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = datetime.timedelta(seconds=join_seconds)
        try:
            self._group: Any = dist.ProcessGroupGloo(store, rank, world_size, options)
        except RuntimeError as e:
            reason = str(e).splitlines()[0]
            raise DeadlineError(f"all {world_size} ranks to join the gloo communicator ({reason})", join_seconds) from e

    def _queue(self, target: torch.Tensor, source: torch.Tensor | None, root: int, stream: Stream) -> None:
        if source is not None:
            stream.copy(target, source)  # gloo broadcasts in place
        stream.call(partial(self._broadcast, target, root))

    def _broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Blocks. Raises PeerLostError when the connection broke or the communicator was abandoned, DeadlineError."""
        options = dist.BroadcastOptions()
        options.rootRank = root
        options.rootTensor = 0
        options.timeout = datetime.timedelta(seconds=self.seconds)
        if self._abandoned.is_set():
            raise PeerLostError("communicator", "abandoned after a failure")
        try:
            work = self._work = self._group.broadcast([tensor], options)
        except RuntimeError as e:
            raise PeerLostError(f"a rank in the broadcast from {self._name(root)}", str(e).splitlines()[0]) from e
        self._wait(work, root)

    def _wait(self, work: Any, root: int) -> None:
        deadline = time.monotonic() + self.seconds
        while True:
            completed = work.is_completed()
            try:
                work.wait(datetime.timedelta(seconds=SLICE))
                return
            except RuntimeError as e:
                if completed:  # else it is only this slice of the wait that is over
                    raise PeerLostError(f"a rank in the broadcast from {self._name(root)}", str(e).splitlines()[0]) from e
            if self._abandoned.is_set():
                raise PeerLostError("communicator", "abandoned after a failure")
            if time.monotonic() > deadline:
                raise DeadlineError(f"the broadcast from {self._name(root)}", self.seconds)

    def abandon(self, missing: Collection[int]) -> bool:
        for group in self.groups.values():
            group.abandon(missing)
        self._abandoned.set()
        return False

    def close(self) -> None:
        """Dropping a group waits for the broadcasts in it, an abandoned one's perhaps up to their deadline: those are kept
        until they are over."""
        self.drop_groups()
        group, self._group = self._group, None
        if self._abandoned.is_set() and group is not None and self._work is not None:
            _unfinished.append((group, self._work))
        _unfinished[:] = [(g, work) for g, work in _unfinished if not work.is_completed()]
