"""Reads on one host: straight from the source's memory, which the reader opens; nothing of it crosses a network.

Its rates say nothing of a network's: reports must name it. Needs the same user and PID namespace, as /proc/PID/fd does.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import msgspec

from checkpoint_engine.errors import ProtocolError, RegionGoneError, TransferError
from checkpoint_engine.transport.peer.base import Deadline, PeerOffer, PeerOptions, PeerTransport, RegionOffer
from checkpoint_engine.transport.peer.connecting import Lease, address_of
from checkpoint_engine.transport.peer.onesided import Mover, OneSidedLane
from checkpoint_engine.transport.peer.reading import LanePeer, Piece, failing
from checkpoint_engine.transport.peer.served import Served


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """A descriptor of process `pid`, and the inode that proves that it is still the same file."""

    pid: int
    descriptor: int
    inode: int


def whereabouts() -> str:
    """Equal for processes that can open each other's descriptors: host, boot, PID namespace and user."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"


class ShmTransport(PeerTransport):
    """Cancelling quiesces: a copy is a system call of the lane's own thread, and ends whatever the source does."""

    kind = "shm"

    def __init__(self, options: PeerOptions) -> None:
        self._options = options

    def export(self, region: Served) -> bytes:
        return msgspec.msgpack.encode(Ticket(os.getpid(), region.fd, region.inode))

    def unexport(self, region: Served) -> None:
        pass

    def connect(
        self, offer: PeerOffer, *, seconds: float, regions: Sequence[RegionOffer] | None = None, nic: int = 0
    ) -> LanePeer:
        """Also raises TransferError when the source is on another host, or its memory cannot be opened."""
        if offer.whereabouts != whereabouts():
            raise TransferError(offer.name, "connect", "not on this host, or another user or PID namespace: shm cannot be used")
        deadline = Deadline.after(seconds)
        address = address_of(offer, nic)
        regions = offer.regions if regions is None else regions
        peer = LanePeer(offer.name, address, regions, self._options.piece_bytes)
        lanes: list[OneSidedLane[None]] = []
        with failing(lanes):
            for _ in range(self._options.connections):
                lease = Lease(peer.name, address, offer.token, "shm", regions, deadline)
                mover = ShmMover(peer.name)
                lanes.append(OneSidedLane(peer, lease, mover))
                mover.open(lease.tickets)
        peer.start(lanes)
        return peer

    def close(self) -> None:
        pass


class ShmMover(Mover[None]):
    """Copies by pread from the source's memfd: no mapping to set up, and no signal if the file is shorter than it was."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._descriptors: dict[int, int] = {}

    def open(self, tickets: dict[int, bytes]) -> None:
        """Raises TransferError, RegionGoneError, ProtocolError."""
        for region, encoded in tickets.items():
            try:
                ticket = msgspec.msgpack.decode(encoded, type=Ticket)
            except msgspec.MsgspecError as e:
                raise ProtocolError(f"{self._peer}, stage open, region {region}: {e}") from e
            try:
                descriptor = os.open(f"/proc/{ticket.pid}/fd/{ticket.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
            except OSError as e:
                raise TransferError(self._peer, "open", f"its memory cannot be opened: {e}", region) from e
            self._descriptors[region] = descriptor
            if os.fstat(descriptor).st_ino != ticket.inode:
                raise RegionGoneError(self._peer, "open", "its descriptor is another file by now", region)

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
