"""Reads over TCP: several connections to a source, which sends straight from its regions; no native dependency."""

from __future__ import annotations

import collections

from checkpoint_engine.errors import ProtocolError
from checkpoint_engine.transport.peer.base import (
    PeerOptions,
)
from checkpoint_engine.transport.peer.connecting import Lease, unexpected
from checkpoint_engine.transport.peer.lanes import LaneTransport
from checkpoint_engine.transport.peer.reading import Lane, LanePeer, Piece
from checkpoint_engine.transport.peer.served import Served
from checkpoint_engine.transport.peer.wire import Bytes, Confirm, Confirmed, Fetch

AHEAD = 2
"""Pieces asked for at a time on one connection, so that the source always has one to send."""


class TcpTransport(LaneTransport):
    """Cancelling quiesces: only the lanes' own threads write, and they have ended by then."""

    kind = "tcp"

    def __init__(self, options: PeerOptions) -> None:
        super().__init__(options, options.connections)

    def export(self, region: Served) -> bytes:
        return b""

    def unexport(self, region: Served) -> None:
        pass

    def _lane(self, peer: LanePeer, lease: Lease) -> TcpLane:
        return TcpLane(peer, lease)

    def close(self) -> None:
        pass


class TcpLane(Lane):
    def __init__(self, owner: LanePeer, lease: Lease) -> None:
        super().__init__(owner, "peer-tcp")
        self._lease = lease
        self._coming: collections.deque[Piece] = collections.deque()  # asked for
        self._arrived: collections.deque[Piece] = collections.deque()  # not yet confirmed

    def carry(self) -> None:
        while self._ask():
            self._take_answer()

    def _ask(self) -> bool:
        """Keep the source busy; False when there is nothing to wait for any more."""
        while len(self._coming) < AHEAD:
            piece = self.owner.take(block=not self._coming and not self._arrived)
            if piece is None:
                break
            op = piece.op
            self._lease.send(Fetch(op.region, op.offset, op.nbytes), piece.read.deadline, piece.what)
            self._coming.append(piece)
        return bool(self._coming or self._arrived)

    def _take_answer(self) -> None:
        oldest = (self._arrived or self._coming)[0]
        deadline = oldest.read.deadline
        answer = self._lease.receive(deadline, oldest.what)
        if isinstance(answer, Bytes) and self._coming:
            piece = self._coming.popleft()
            if answer.nbytes != piece.op.nbytes:
                raise ProtocolError(f"{self._lease.peer}, stage {piece.what}: sent {answer.nbytes} bytes")
            view = piece.read.destination.view[piece.op.target : piece.op.target + piece.op.nbytes]
            self._lease.receive_into(view, piece.read.deadline, piece.what)
            # Asked only now: the answer says that what has arrived came from memory that was leased all the time.
            self._lease.send(Confirm(), piece.read.deadline, "confirm")
            self._arrived.append(piece)
        elif isinstance(answer, Confirmed) and self._arrived:
            self._arrived.popleft().read.landed()
        else:
            raise unexpected(self._lease.peer, answer, "fetch")

    def interrupt(self) -> None:
        self._lease.interrupt()

    def wind_up(self) -> None:
        self._lease.close()
