"""Reads by an engine that fetches without the source's help: the lane that drives it, with a lease beside it.

The source knows nothing of such a read. What keeps the region in place is a lease on a connection of our own, and what makes a
read count is that the lease is confirmed after the bytes have come.
"""

from __future__ import annotations

import collections
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

from checkpoint_engine.errors import NOT_DECODED, ProtocolError
from checkpoint_engine.transport.peer.connecting import Lease
from checkpoint_engine.transport.peer.reading import Lane, LanePeer, Piece

Started = TypeVar("Started")
Ticket = TypeVar("Ticket")

BUSY_SECONDS = 50e-6
LAZY_SECONDS = 0.2
"""Between two looks at an operation: at first, and once nobody waits for it any more."""


def read_tickets(peer: str, tickets: dict[int, bytes], kind: type[Ticket]) -> Iterator[tuple[int, Ticket]]:
    """Each region's ticket. Raises ProtocolError."""
    for region, encoded in tickets.items():
        try:
            ticket = msgspec.msgpack.decode(encoded, type=kind)
        except NOT_DECODED as e:
            raise ProtocolError(f"{peer}, stage open, region {region}: {e}") from e
        yield region, ticket


class Mover(ABC, Generic[Started]):
    """How an implementation moves one piece. Used by one lane's thread only."""

    ahead = 1
    """Operations under way at a time."""

    @abstractmethod
    def open(self, tickets: dict[int, bytes]) -> None:
        """tickets: region -> what `PeerTransport.export` said of it. Raises ProtocolError, RegionGoneError, TransferError."""

    @abstractmethod
    def start(self, piece: Piece) -> Started:
        """Begin. When it raises, nothing was begun."""

    @abstractmethod
    def done(self, started: Started) -> bool:
        """Whether all bytes are there; does not block for long. Raises when the operation failed."""

    def over(self, started: Started) -> bool | None:
        """After a failure: True when nothing can be written any more, None when that will never be known."""
        return True

    def close(self) -> None:
        """Give up what it owns, when all its operations are over."""


class OneSidedLane(Lane, Generic[Started]):
    def __init__(self, owner: LanePeer, lease: Lease, mover: Mover[Started]) -> None:
        super().__init__(owner, "peer-read")
        self._lease, self._mover = lease, mover
        self._ended = threading.Event()
        self._moving: collections.deque[tuple[Piece, Started]] = collections.deque()

    def open(self) -> None:
        self._mover.open(self._lease.tickets)

    def carry(self) -> None:
        while not self._ended.is_set():
            while len(self._moving) < self._mover.ahead:
                piece = self.owner.take(block=not self._moving)
                if piece is None:
                    break
                self._moving.append((piece, self._mover.start(piece)))
            if not self._moving:
                return
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        piece, started = self._moving[0]
        pause = BUSY_SECONDS
        while not self._mover.done(started):
            if self._ended.wait(pause):
                return
            pause = min(1e-3, 1.2 * pause)
            if not piece.read.deadline.left:
                piece.read.poll()  # fails it, as late
                return
        self._moving.popleft()
        self._lease.confirm(piece.read.deadline)
        piece.read.landed()

    def interrupt(self) -> None:
        self._ended.set()
        self._lease.interrupt()

    def wind_up(self) -> None:
        for _, started in self._moving:
            while not (over := self._mover.over(started)):
                if over is None:
                    self.unknown = True
                    break
                time.sleep(LAZY_SECONDS)
        if not self.unknown:
            self._mover.close()
        self._lease.close()
