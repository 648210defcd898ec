"""What receivers bring before an update of some ranks, and what they agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from checkpoint_engine.errors import SettingsError
from checkpoint_engine.manifest import Manifest, RankManifest
from checkpoint_engine.planning.peers import Assigned, FetchPlan, Receiver
from checkpoint_engine.planning.plan import Plan
from checkpoint_engine.server.gather import Part
from checkpoint_engine.server.sources import RDMA, Metas
from checkpoint_engine.transport.peer.base import choose


class Bid(msgspec.Struct, frozen=True, array_like=True):
    """What each receiver brings first. source: its rank in the manifest; -1: it is in none. part.manifest: digest of the metas.
    transport: see Settings.peer_transport."""

    part: Part
    host: str
    where: str
    transport: str
    source: int = -1
    error: str = ""


class Agreed(NamedTuple):
    """group: the receivers, by their rank among themselves. kinds: rank of a source -> transport, of this rank. by: of all."""

    metas: Metas
    reads: FetchPlan
    group: tuple[Receiver, ...]
    stream: Manifest
    sources: tuple[tuple[int, int], ...]
    plan: Plan
    ring_bytes: int
    kinds: dict[int, str]
    by: str


def crossing(reads: FetchPlan, receiver: int) -> list[Assigned]:
    """What a receiver reads from others."""
    return [read for read in reads.reads() if read.receiver == receiver != read.held.owner]


def kind_of(metas: Metas, rank: int, bid: Bid) -> str:
    """The transport by which the receiver reads a source. Raises SettingsError when that does not offer it."""
    offer = metas.offers[rank]
    if offer is None:
        raise SettingsError(f"rank {rank} is not to be read")
    if bid.transport == "auto":
        return choose(offer, bid.where, ())
    if bid.transport not in offer.transports:
        raise SettingsError(
            f"{offer.name} does not offer {bid.transport!r} (it has {', '.join(offer.transports)}): "
            f"{'set CHECKPOINT_ENGINE_PEER_TRANSPORT there, too' if bid.transport in RDMA else 'choose another transport'}"
        )
    return bid.transport


def renumbered(derived: Manifest, group: Sequence[Receiver]) -> Manifest:
    """By the receivers' ranks among themselves; who reads nothing has no regions."""
    regions = {rank.rank: rank.regions for rank in derived.ranks}
    ranks = tuple(RankManifest(n, receiver.host, "", regions.get(receiver.rank, ())) for n, receiver in enumerate(group))
    return Manifest(derived.checkpoint, ranks)
