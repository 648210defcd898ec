"""Where a receiver's bytes come from: connections to the sources, memory to read into, and other holders when a source fails."""

from __future__ import annotations

import bisect
import collections
import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from checkpoint_engine.devices.base import Closing
from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineError,
    ManifestError,
    PeerLostError,
    ProtocolError,
    RegionGoneError,
    TransferError,
    bare,
)
from checkpoint_engine.manifest import TensorMeta
from checkpoint_engine.planning.peers import FetchPlan, Receiver, replace_sources
from checkpoint_engine.planning.plan import ALIGNMENT
from checkpoint_engine.server.slots import Slot
from checkpoint_engine.server.sources import Metas
from checkpoint_engine.transport.peer.base import Peer, PeerOffer, PeerOptions, PeerTransport, ReadOp, open_transport
from checkpoint_engine.transport.peer.reading import Read

log = logging.getLogger(__name__)
FAILURES = (DeadlineError, PeerLostError, ProtocolError, TransferError)
Way = tuple[int, int]
"""(rank of the source, number of its NIC)."""


class Want(NamedTuple):
    """Bytes [start, start + nbytes) of a tensor, which go to `target` in the slot, whoever they come from."""

    tensor: str
    start: int
    nbytes: int
    target: int


def wants_of(tensors: Sequence[TensorMeta], source: int, nbytes: int, target: int) -> Iterator[Want]:
    """What of `tensors`, a region's by offset and size, is in its bytes [source, source + nbytes), which go to `target`."""
    first = max(0, bisect.bisect_right(tensors, source, key=lambda t: t.offset) - 1)
    for tensor in tensors[first:]:
        if tensor.offset >= source + nbytes:
            return
        begin, end = max(source, tensor.offset), min(source + nbytes, tensor.offset + tensor.nbytes)
        if begin < end:
            yield Want(tensor.name, begin - tensor.offset, end - begin, target + begin - source)


def join_ops(ops: Iterable[ReadOp]) -> list[ReadOp]:
    """Neighbours in both the source's region and the slot in one go, with the few bytes of alignment between them."""
    joined: list[ReadOp] = []
    for op in ops:
        if joined:
            last = joined[-1]
            gap = op.offset - last.offset - last.nbytes
            if op.region == last.region and op.offset - last.offset == op.target - last.target and 0 <= gap < ALIGNMENT:
                joined[-1] = ReadOp(last.region, last.offset, last.nbytes + gap + op.nbytes, last.target)
                continue
        joined.append(op)
    return joined


class _Connection:
    """delivered: whether any read through it came to a good end. closed: no thread may use it any more."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.peer: Peer | None = None
        self.delivered = self.closed = False

    def close(self) -> None:
        self.closed = True  # first: a thread that is connecting looks at it when it has
        if self.peer is not None:
            self.peer.close()


class Transports(Closing):
    """By kind, opened when first needed and kept: engines take seconds to start."""

    def __init__(self, options: Callable[[], PeerOptions]) -> None:
        self._options = options
        self._opened: dict[str, PeerTransport] = {}
        self._owned = contextlib.ExitStack()

    def get(self, kind: str) -> PeerTransport:
        """Raises SettingsError when it is not installed."""
        if kind not in self._opened:
            self._opened[kind] = self._owned.enter_context(open_transport(kind, self._options()))
        return self._opened[kind]

    def close(self) -> None:
        self._owned.close()
        self._opened.clear()


class Supply(Closing):
    """Reads wants into slots, from whoever holds them. Threads share it. Owns its connections, not the slots.

    group: as in `plan`, whose only group it is. kinds: rank of a source -> transport to read it by.
    """

    def __init__(
        self,
        metas: Metas,
        plan: FetchPlan,
        group: Sequence[Receiver],
        kinds: dict[int, str],
        transports: Transports,
        slots: Sequence[Slot],
        connect_seconds: float,
    ) -> None:
        """Raises SettingsError when a transport is not installed."""
        self._metas, self._plan, self._group, self._kinds = metas, plan, group, kinds
        self._connect_seconds = connect_seconds
        self.slots = tuple(slots)
        self._lock = threading.Lock()
        self._connections: dict[Way, _Connection] = {}
        self._lost: dict[int, CheckpointEngineError] = {}
        self._earlier: dict[str, tuple[int, ...]] = {}  # tensors -> their sources that were lost
        self._fatal: CheckpointEngineError | None = None
        self.stopped = False
        self._place()
        self._transports = {kind: transports.get(kind) for kind in sorted(set(kinds.values()))}

    def _place(self) -> None:
        self._reads = {read.held.tensor.name: read for read in self._plan.reads()}

    def _offer(self, rank: int) -> PeerOffer:
        """Raises ManifestError when that rank is not to be read."""
        offer = self._metas.offers[rank]
        if offer is None:
            raise ManifestError(f"rank {rank} is not to be read")
        return offer

    def sources_of(self, tensor: str) -> tuple[int, ...]:
        """The ranks that its bytes may have come from."""
        with self._lock:
            return *self._earlier.get(tensor, ()), *(r.held.owner for r in [self._reads.get(tensor)] if r)

    # --- reading -------------------------------------------------------------------------------------------------------

    def read(self, wants: Sequence[Want], slot: Slot, seconds: float) -> None:
        """Until all of them are in the slot. What a source fails to deliver comes from other holders.

        seconds: for each source to deliver its part. Raises ManifestError when nobody is left that holds a tensor, naming it and
        what became of its sources; TransferError after `stop`.
        """
        rest = list(wants)
        while rest:
            failed = self._round(rest, slot, seconds)
            if failed and slot.quarantined:
                slot.renew()
                failed = list(wants)
            rest = failed

    def _round(self, wants: Sequence[Want], slot: Slot, seconds: float) -> list[Want]:
        """Ask everybody for their part, then wait for all. Returns what did not come."""
        failed: list[Want] = []
        under_way: list[tuple[Way, _Connection, Read, list[Want]]] = []
        for way, located in self._by_way(wants).items():
            part = [want for want, _ in located]
            connection = self._connection(way)
            try:
                peer = self._connect(way, connection)
                transport = self._transports[self._kinds[way[0]]]
                read = peer.submit_read(slot.destination(transport), join_ops(op for _, op in located), seconds=seconds)
                under_way.append((way, connection, read, part))
            except FAILURES as e:
                failed += part
                self._failed(way, connection, e)
        for way, connection, read, part in under_way:
            try:
                read.wait()
                connection.delivered = True
            except FAILURES as e:
                failed += part
                self._failed(way, connection, e)
        return failed

    def _by_way(self, wants: Sequence[Want]) -> dict[Way, list[tuple[Want, ReadOp]]]:
        parts: dict[Way, list[tuple[Want, ReadOp]]] = collections.defaultdict(list)
        with self._lock:
            self._check()
            for want in wants:
                read = self._reads[want.tensor]
                held = read.held
                number = self._offer(held.owner).regions[held.region].region
                op = ReadOp(number, held.source + want.start, want.nbytes, want.target)
                parts[held.owner, max(0, read.nic)].append((want, op))
        return parts

    def _check(self) -> None:
        if self.stopped:
            raise TransferError("this rank", "fetch", "the reads were stopped")
        if self._fatal is not None:
            raise self._fatal

    # --- connections ---------------------------------------------------------------------------------------------------

    def _connection(self, way: Way) -> _Connection:
        with self._lock:
            self._check()
            return self._connections.setdefault(way, _Connection())

    def _connect(self, way: Way, connection: _Connection) -> Peer:
        with connection.lock:
            offer = self._offer(way[0])
            if connection.peer is None and not connection.closed:
                transport = self._transports[self._kinds[way[0]]]
                connection.peer = transport.connect(offer, seconds=self._connect_seconds, nic=way[1])
                if connection.closed:  # meanwhile, and without it
                    connection.close()
            if connection.peer is None or connection.closed:
                raise TransferError(offer.name, "connect", "the connection was given up")
            return connection.peer

    def _failed(self, way: Way, connection: _Connection, error: CheckpointEngineError) -> None:
        """Give the connection up, and the source, unless it has delivered before: it may only have found us idle."""
        connection.closed = True
        bare(error)  # the read, whose frames hold its slot, keeps it
        with self._lock:
            if self.stopped or self._connections.get(way) is not connection:
                return  # another thread was first
            del self._connections[way]
            again = connection.delivered and not isinstance(error, DeadlineError | ProtocolError | RegionGoneError)
            if not again:
                self._lose(way[0], error)
        log.warning("a source failed%s: %s", ", and is tried again" if again else "", error)
        connection.close()

    def _lose(self, rank: int, error: CheckpointEngineError) -> None:
        self._lost[rank] = error
        names = [name for name, read in self._reads.items() if read.held.owner == rank]
        self._earlier |= {name: (*self._earlier.get(name, ()), rank) for name in names}
        nics = nics_of(self._metas)
        try:
            self._plan = replace_sources(
                self._plan, self._metas, [self._group], unreadable(self._metas) | set(self._lost), (), nics
            )
        except ManifestError as e:
            self._fatal = ManifestError(f"{'; '.join(str(cause) for cause in self._lost.values())}: {e}")
        self._place()

    def stop(self) -> None:
        """End all reads soon, from any thread."""
        with self._lock:
            self.stopped = True
            connections, self._connections = list(self._connections.values()), {}
        for connection in connections:
            connection.close()

    def close(self) -> None:
        self.stop()
        if self._fatal is not None:  # it was raised in frames that hold the slots
            bare(self._fatal)


def unreadable(metas: Metas) -> set[int]:
    """Ranks that hold something and make no offer, or another one than the manifest needs."""
    found = set()
    for rank, offer in zip(metas.ranks, metas.offers or [None] * metas.world_size, strict=True):
        if rank.regions and (offer is None or [r.nbytes for r in offer.regions] != [r.nbytes for r in rank.regions]):
            found.add(rank.rank)
    return found


def nics_of(metas: Metas) -> dict[int, int]:
    """Rank -> network interfaces by which it can be read."""
    return {number: len(offer.addresses) for number, offer in enumerate(metas.offers) if offer is not None}
