"""Connecting, the same for every implementation: lanes, each with a lease on a connection of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from checkpoint_engine.transport.peer.base import Deadline, PeerOffer, PeerOptions, PeerTransport, RegionOffer
from checkpoint_engine.transport.peer.connecting import Lease, address_of
from checkpoint_engine.transport.peer.reading import Lane, LanePeer, failing


class LaneTransport(PeerTransport):
    """One whose peers are made of lanes. lanes: how many each peer has."""

    def __init__(self, options: PeerOptions, lanes: int) -> None:
        self._options, self._lanes = options, lanes

    @abstractmethod
    def _lane(self, peer: LanePeer, lease: Lease) -> Lane:
        """A lane that owns `lease` from now on. What can fail belongs into its `open`."""

    def connect(
        self, offer: PeerOffer, *, seconds: float, regions: Sequence[RegionOffer] | None = None, nic: int = 0
    ) -> LanePeer:
        deadline = Deadline.after(seconds)
        address = address_of(offer, nic)
        regions = offer.regions if regions is None else regions
        peer = LanePeer(offer.name, address, regions, self._options.piece_bytes)
        lanes: list[Lane] = []
        with failing(lanes):
            for _ in range(self._lanes):
                lane = self._lane(peer, Lease(peer.name, address, offer.token, self.kind, regions, deadline))
                lanes.append(lane)
                lane.open()
        peer.start(lanes)
        return peer
