"""Sharing within one host, without a communicator: the owner of a piece copies it into the other ranks' rings itself.

On GPUs these are peer copies, which the copy engines make: no kernel takes time slices from the engine, none spins for its
partner, nothing has to be joined, and no memory is kept (docs/notes-cuda.md has the figures). On a CPU it is one memcpy
per receiver, where gloo takes three.

Order is kept by two numbers of every rank, in a page that the others read. posted: how many broadcasts the rank has
reached, in an order that is the same on all; so its ring has room for those in which it takes part. arrived: how many of its own
are in all rings in which they must be.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial

import msgspec
import torch

from checkpoint_engine.devices.base import Closing, Device, Event, Mapping, Ring, SharedHandle, Stream
from checkpoint_engine.devices.cpu import CpuMapping, CpuStream
from checkpoint_engine.devices.polling import poll
from checkpoint_engine.errors import CheckpointEngineError, DeadlineError, PeerLostError, bare
from checkpoint_engine.memory.region import PAGE, HostRegion
from checkpoint_engine.transport.collective import Collective, Ranks
from checkpoint_engine.transport.descriptors import SharedDescriptor

SLICE = 0.1
"""Seconds between two looks at whether a wait was given up."""

DEATH_SECONDS = 2.0
"""How long a process whose link broke may take to be gone: it gives its GPU back first."""


class Member(msgspec.Struct, frozen=True, array_like=True):
    """A rank as the others see it. memory: where the ring is host memory, its descriptors."""

    pid: int
    page: SharedDescriptor
    ring: SharedHandle
    memory: tuple[SharedDescriptor, ...]


class Page(Closing):
    """A rank's two numbers. Only the rank itself changes them; an aligned word is read and written whole."""

    def __init__(self, shared: SharedDescriptor | None = None) -> None:
        """shared: another rank's. Raises OSError, ProtocolError when it cannot be opened."""
        self._memory: HostRegion | Mapping
        if shared is None:
            self._memory = region = HostRegion(PAGE)
            self.shared = SharedDescriptor.of(region.fd, PAGE)
        else:
            self._memory = CpuMapping(shared.open(os.O_RDWR), PAGE, private=False)
            self.shared = shared
        self._keep = self._memory.tensor  # mapped as long as the numbers may be read
        self._numbers = (ctypes.c_uint64 * 2).from_address(self._keep.data_ptr())

    @property
    def posted(self) -> int:
        return self._numbers[0]

    @posted.setter
    def posted(self, number: int) -> None:
        self._numbers[0] = number

    @property
    def arrived(self) -> int:
        return self._numbers[1]

    @arrived.setter
    def arrived(self, number: int) -> None:
        self._numbers[1] = number

    def close(self) -> None:
        self._memory.close()


class Process(Closing):
    """Another process of this host, to be told dead from merely silent."""

    def __init__(self, pid: int) -> None:
        self._descriptor: int | None = None
        with contextlib.suppress(OSError):  # kernels before 5.3, or it is gone and its number may be another's
            self._descriptor = os.pidfd_open(pid)

    def wait_dead(self, seconds: float) -> bool:
        """True when it is certainly gone, with all it had open, by the end of `seconds`."""
        if self._descriptor is None:
            return False
        poller = select.poll()
        poller.register(self._descriptor, select.POLLIN)
        return bool(poller.poll(max(0.0, seconds) * 1e3))

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class PushCollective(Collective):
    """Made for one update, of rings that stay where they are until its end.

    A thread of its own waits for a piece to be lifted and for the receivers to have room, and queues the copies; another
    waits for these and counts them as arrived. So `broadcast` never blocks.
    """

    staged = False
    in_step = False

    def __init__(self, device: Device, rank: int, ring: Ring, seconds: float) -> None:
        super().__init__(seconds)
        self.rank, self._device, self._ring = rank, device, ring
        self._calls, self._due = 0, [0]
        self._halted = threading.Event()
        self.error: CheckpointEngineError | None = None
        self._members: Sequence[Member] = ()
        self._processes: list[Process] = []
        self._rings: dict[int, torch.Tensor] = {}
        with contextlib.ExitStack() as stack:
            page = stack.enter_context(Page())
            self._pages = [page]
            self._mapped = stack.enter_context(contextlib.ExitStack())
            stack.callback(self._rings.clear)  # or they would stay mapped as long as this object is there
            self._pushing = stack.enter_context(CpuStream("push"))
            self._landing = stack.enter_context(CpuStream("land"))
            handle, descriptors = ring.share()
            memory = tuple(SharedDescriptor.of(d, ring.nbytes) for d in descriptors)
            self.member = Member(os.getpid(), page.shared, handle, memory)
            self._owned = stack.pop_all()

    def sent(self, ranks: Ranks) -> int:
        return len(self._members if ranks is None else ranks) - 1

    def meet(self, members: Sequence[Member], *, at_once: bool = True) -> None:
        """Open what all ranks, in rank order, have told of themselves.

        at_once: the rings too. Else they are opened in the thread that copies, when the first pieces are being lifted: mapping
        another GPU's memory takes 1 ms, from 512 MiB on 10 to 20 (measured on H200), and a lift that is queued after it has begun
        does not start before it is over. What fails there fails the update.

        Raises OSError, ProtocolError, DeviceError.
        """
        own = self._pages[0]
        self._members, self._due = members, [0] * len(members)
        self._processes = [self._owned.enter_context(Process(m.pid)) for m in members]
        self._pages = [
            own if rank == self.rank else self._owned.enter_context(Page(member.page)) for rank, member in enumerate(members)
        ]
        if at_once:
            self._open_rings()

    def _open_rings(self) -> None:
        for rank in self._receivers():
            member = self._members[rank]
            with contextlib.ExitStack() as opened:
                descriptors = []
                for shared in member.memory:
                    descriptors.append(shared.open(os.O_RDWR))
                    opened.callback(os.close, descriptors[-1])
                opened.pop_all()
            self._rings[rank] = self._mapped.enter_context(self._device.open_peer(member.ring, tuple(descriptors))).tensor

    def _receivers(self) -> list[int]:
        """From the next rank on, so that not all owners copy to the same one first."""
        size = len(self._members)
        return [(self.rank + step) % size for step in range(1, size)]

    def broadcast(
        self,
        target: torch.Tensor,
        source: torch.Tensor | None,
        root: int,
        stream: Stream,
        ready: Event | None,
        ranks: Ranks = None,
    ) -> Event:
        call = self._reach(root)
        if root == self.rank:
            receivers = [rank for rank in self._receivers() if ranks is None or rank in ranks]
            push = partial(self._push, target, call, self._due[root], stream, ready, receivers)
            self._pushing.call(partial(self._guard, push))
        return _Arrival(self, self._pages[root], self._due[root])

    def skip(self, root: int) -> None:
        self._reach(root)

    def _reach(self, root: int) -> int:
        """Count a call, as all ranks do, and say that this rank has come so far. Returns its number."""
        if self._halted.is_set():
            raise PeerLostError("ranks of this host", "sharing was stopped after a failure")
        call, self._calls = self._calls, self._calls + 1
        self._pages[self.rank].posted = self._calls
        self._due[root] += 1
        return call

    def _push(
        self, target: torch.Tensor, call: int, number: int, stream: Stream, ready: Event | None, receivers: Sequence[int]
    ) -> None:
        self._device.bind_thread()
        if not self._rings:
            self._open_rings()
        if ready is not None:
            self._wait(ready.wait, "a piece to be lifted")
        place = slice(target.storage_offset(), target.storage_offset() + target.numel())
        start: Event | None = None
        for rank in receivers:
            self.awaited = f"rank {rank} to have room"
            self._wait(partial(self._has_room, rank, call), self.awaited)
            self.awaited = ""
            start = start or stream.record()
            stream.copy(self._rings[rank][place], target)
        end = stream.record()
        self.spans.add(stream, start or end, end)
        self._landing.call(partial(self._guard, partial(self._land, end, number)))

    def _has_room(self, rank: int, call: int, seconds: float) -> bool:
        return poll(lambda: self._pages[rank].posted > call, seconds)

    def _land(self, copied: Event, number: int) -> None:
        self._wait(copied.wait, "a piece to be copied to the other ranks")
        self._pages[self.rank].arrived = number

    def _wait(self, wait: Callable[[float], bool], what: str) -> None:
        deadline = time.monotonic() + self.seconds
        while not wait(SLICE):
            if self._halted.is_set():
                raise PeerLostError("ranks of this host", "sharing was stopped after a failure")
            if time.monotonic() > deadline:
                raise DeadlineError(what, self.seconds)

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            if self.error is None and not self._halted.is_set():
                work()
        except Exception as e:  # of any kind: whoever waits for the arrival raises it
            error = (
                e if isinstance(e, CheckpointEngineError) else PeerLostError("a ring of this host", f"{type(e).__name__}: {e}")
            )
            self.error = self.error or bare(error)

    def rest(self) -> None:
        # In the thread that copies, behind whatever it still does with them.
        self._pushing.call(partial(self._guard, self._unmap))
        if not self._pushing.record().wait(self.seconds):
            raise DeadlineError("the other ranks' rings to be unmapped", self.seconds)
        if self.error is not None:
            raise self.error

    def _unmap(self) -> None:
        self._rings.clear()
        self._mapped.close()

    def quiet(self, stream: Stream, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        self._halted.set()
        for thread in (self._pushing, self._landing):
            if not thread.finish(deadline - time.monotonic()):
                return False
        try:
            copied = stream.record().wait(max(0.1, deadline - time.monotonic()))
        except Exception:  # what failed copies no more
            copied = True
        if copied:
            self._unmap()
        return copied

    def abandon(self, missing: Collection[int]) -> bool:
        """Ranks that died write no more."""
        self._halted.set()
        deadline = time.monotonic() + DEATH_SECONDS
        return all(self._processes[rank].wait_dead(deadline - time.monotonic()) for rank in missing if rank != self.rank)

    def close(self) -> None:
        self._halted.set()
        self._owned.close()


class _Arrival(Event):
    """Of broadcast `number` of the rank whose page it is, in this rank's ring."""

    def __init__(self, collective: PushCollective, page: Page, number: int) -> None:
        self._collective, self._page, self._number = collective, page, number

    def done(self) -> bool:
        if self._collective.error is not None:
            raise self._collective.error
        return self._page.arrived >= self._number

    def wait(self, seconds: float) -> bool:
        return poll(self.done, seconds)
