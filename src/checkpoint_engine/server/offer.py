"""What each rank brings to the start of an update, and how all come to agree or learn who cannot take part."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from checkpoint_engine.errors import AgreementError
from checkpoint_engine.transport.descriptors import SharedDescriptor
from checkpoint_engine.transport.links import Links


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """host: for messages. plan: its digest. generation: of the communicator that this rank has or wants. where, regions:
    for ranks of the same host to open (None: they cannot). copies: it would share by peer copies. method: see Settings. maps: its
    worker reads host memory as its own. reads: bytes that its worker would pull; -1: it has no load plan, as far as is known.
    ahead: digest of the regions that its worker has mapped for that. verify: see Settings. error: why this rank cannot take
    part. needs: the buckets of the plan of which its worker would take anything, one bit each (planning.bits); empty: it needs
    all, as far as is known."""

    checkpoint: str
    plan: str
    version: str
    device: str
    handle: str
    generation: int
    host: str
    where: str = ""
    copies: bool = False
    regions: tuple[SharedDescriptor, ...] | None = None
    error: str = ""
    method: str = "auto"
    maps: bool = False
    reads: int = -1
    ahead: str = ""
    verify: str = "auto"
    needs: bytes = b""


def verified(offers: Sequence[Offer]) -> bool:
    """Whether workers check digests. Who says "on" has it for all; who says "off", where nobody does."""
    wanted = {offer.verify for offer in offers}
    return "on" in wanted or "off" not in wanted


def exchange_offers(links: Links, mine: Offer, seconds: float, number: int) -> list[Offer]:
    """All ranks' offers, in rank order. number: of the round.

    Raises AgreementError naming the rank that cannot take part, or wants something else than rank 0; PeerLostError,
    DeadlineError.
    """
    payloads = links.exchange("update", msgspec.msgpack.encode(mine), seconds, number)
    offers = [msgspec.msgpack.decode(p, type=Offer) for p in payloads]
    for rank, offer in enumerate(offers):
        if offer.error:
            raise AgreementError(f"rank {rank} ({offer.host}) cannot take part in the update: {offer.error}")
        for field in ("checkpoint", "plan"):
            theirs, leaders = getattr(offer, field), getattr(offers[0], field)
            if theirs != leaders:
                raise AgreementError(
                    f"rank {rank} ({offer.host}) wants to update with {field} {theirs!r}, rank 0 with {leaders!r}"
                )
    return offers
