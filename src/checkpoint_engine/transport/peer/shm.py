"""Reads on one host: straight from the source's memory, which the reader opens; nothing of it crosses a network.

Its rates say nothing of a network's: reports must name it. Needs the same user and PID namespace, as /proc/PID/fd does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec

from checkpoint_engine.errors import RegionGoneError, TransferError
from checkpoint_engine.transport.descriptors import AnotherFileError, SharedDescriptor, whereabouts
from checkpoint_engine.transport.peer.base import PeerOffer, PeerOptions, RegionOffer
from checkpoint_engine.transport.peer.connecting import Lease
from checkpoint_engine.transport.peer.lanes import LaneTransport
from checkpoint_engine.transport.peer.onesided import Mover, OneSidedLane, read_tickets
from checkpoint_engine.transport.peer.reading import LanePeer, Piece
from checkpoint_engine.transport.peer.served import Served


class ShmTransport(LaneTransport):
    """Cancelling quiesces: a copy is a system call of the lane's own thread, and ends whatever the source does."""

    kind = "shm"

    def __init__(self, options: PeerOptions) -> None:
        super().__init__(options, options.connections)

    def export(self, region: Served) -> bytes:
        return msgspec.msgpack.encode(SharedDescriptor.of(region.fd, region.offer.nbytes))

    def unexport(self, region: Served) -> None:
        pass

    def connect(
        self, offer: PeerOffer, *, seconds: float, regions: Sequence[RegionOffer] | None = None, nic: int = 0
    ) -> LanePeer:
        """Also raises TransferError when the source is on another host, or its memory cannot be opened."""
        if offer.whereabouts != whereabouts():
            raise TransferError(offer.name, "connect", "not on this host, or another user or PID namespace: shm cannot be used")
        return super().connect(offer, seconds=seconds, regions=regions, nic=nic)

    def _lane(self, peer: LanePeer, lease: Lease) -> OneSidedLane[None]:
        return OneSidedLane(peer, lease, ShmMover(peer.name))

    def close(self) -> None:
        pass


class ShmMover(Mover[None]):
    """Copies by pread from the source's memfd: no mapping to set up, and no signal if the file is shorter than it was."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._descriptors: dict[int, int] = {}

    def open(self, tickets: dict[int, bytes]) -> None:
        for region, shared in read_tickets(self._peer, tickets, SharedDescriptor):
            try:
                self._descriptors[region] = shared.open(os.O_RDONLY)
            except AnotherFileError as e:
                raise RegionGoneError(self._peer, "open", "its descriptor is another file by now", region) from e
            except OSError as e:
                raise TransferError(self._peer, "open", f"its memory cannot be opened: {e}", region) from e

    def start(self, piece: Piece) -> None:
        op = piece.op
        view = piece.read.destination.view[op.target : op.target + op.nbytes]
        done = 0
        while done < op.nbytes:
            got = os.preadv(self._descriptors[op.region], [view[done:]], op.offset + done)
            if not got:
                raise TransferError(self._peer, "fetch", f"it ends at byte {op.offset + done}", op.region)
            done += got

    def done(self, started: None) -> bool:
        return True

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
