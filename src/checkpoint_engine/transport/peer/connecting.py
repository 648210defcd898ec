"""The reader's end of a connection: greeting, and opening regions, which leases them."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineError,
    PeerLostError,
    ProtocolError,
    RegionGoneError,
    TransferError,
)
from checkpoint_engine.transport.peer.base import Deadline, PeerOffer, RegionOffer
from checkpoint_engine.transport.peer.wire import (
    FROM_SOURCE,
    Confirm,
    Confirmed,
    FromSource,
    Hello,
    Open,
    Opened,
    Refused,
    Welcome,
    Wire,
)

OPENING = 256
"""Requests on their way at a time: few enough for the sockets' buffers."""


def refusal(peer: str, refused: Refused) -> TransferError:
    region = None if refused.region < 0 else refused.region
    kind = RegionGoneError if refused.gone else TransferError
    return kind(peer, refused.stage, refused.reason, region)


def unexpected(peer: str, message: FromSource, stage: str) -> CheckpointEngineError:
    """The error for a message that is not the answer to what was asked."""
    if isinstance(message, Refused):
        return refusal(peer, message)
    return ProtocolError(f"{peer}, stage {stage}: sent {type(message).__name__}, out of turn")


def address_of(offer: PeerOffer, nic: int) -> tuple[str, int]:
    if not offer.addresses:
        raise TransferError(offer.name, "connect", "it offers no address")
    return offer.addresses[nic % len(offer.addresses)]


class Lease(Wire[FromSource]):
    """A connection on which regions are open: it holds until the connection ends.

    tickets  region -> what the implementation must know of it
    """

    def __init__(
        self, peer: str, address: tuple[str, int], token: str, kind: str, regions: Sequence[RegionOffer], deadline: Deadline
    ) -> None:
        """Raises DeadlineError, PeerLostError, ProtocolError, RegionGoneError, TransferError; all name `peer`."""
        try:
            sock = socket.create_connection(address, timeout=max(0.001, deadline.left))
        except TimeoutError as e:
            raise DeadlineError(f"{peer}, stage connect", deadline.seconds) from e
        except OSError as e:
            raise PeerLostError(peer, f"stage connect: {e}") from e
        super().__init__(sock, peer, FromSource, FROM_SOURCE, deadline)  # type: ignore[arg-type]
        self.tickets: dict[int, bytes] = {}
        try:
            self.send(Hello(token, f"process {os.getpid()} of {socket.gethostname()}"), deadline, "connect")
            welcome = self.receive(deadline, "connect")
            if not isinstance(welcome, Welcome):
                raise unexpected(peer, welcome, "connect")
            for start in range(0, len(regions), OPENING):
                self._open(regions[start : start + OPENING], kind, deadline)
        except BaseException:
            self.close()
            raise

    def _open(self, regions: Sequence[RegionOffer], kind: str, deadline: Deadline) -> None:
        for region in regions:
            self.send(Open(region.region, region.generation, kind), deadline, "open")
        for region in regions:
            opened = self.receive(deadline, f"open, region {region.region}")
            if not isinstance(opened, Opened) or opened.region != region.region:
                raise unexpected(self.peer, opened, "open")
            self.tickets[opened.region] = opened.ticket

    def confirm(self, deadline: Deadline) -> None:
        """Raises PeerLostError and others when the lease may have ended."""
        self.send(Confirm(), deadline, "confirm")
        answer = self.receive(deadline, "confirm")
        if not isinstance(answer, Confirmed):
            raise unexpected(self.peer, answer, "confirm")
