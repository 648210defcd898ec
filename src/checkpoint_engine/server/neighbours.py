"""How ranks of one host come to copy into each other's rings, or find that they cannot and broadcast instead."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence

import msgspec

from checkpoint_engine.errors import UpdateError, said
from checkpoint_engine.server.lane import Lane
from checkpoint_engine.transport.links import Links
from checkpoint_engine.transport.push import Member, PushCollective

log = logging.getLogger(__name__)


class _Introduction(msgspec.Struct, frozen=True, array_like=True):
    """proven: it has mapped these ranks' rings before. error: why this rank cannot take part at all."""

    member: Member | None
    proven: bool = False
    error: str = ""


def meet_neighbours(
    stack: contextlib.ExitStack,
    links: Links,
    prepare: Callable[[], Lane],
    hosts: Sequence[str],
    proven: bool,
    timeout: float,
    seconds: float,
) -> Lane | None:
    """Collective: the lane that `prepare` makes, with what all ranks share by in this update, which `stack` owns. None, on all
    ranks, when one cannot map the others' rings: devices without peer access, or hidden by CUDA_VISIBLE_DEVICES.

    proven: this rank has done so in its last update; where all have, nobody waits for the rings to be mapped. timeout: of one
    wait while sharing. seconds: for all ranks to come. Raises UpdateError naming a rank that has no lane,
    and as `Links.exchange` does.
    """
    try:
        lane = prepare()
        collective = stack.enter_context(PushCollective(lane.device, links.rank, lane.ring, timeout))
        mine = _Introduction(collective.member, proven)
    except Exception as e:  # of any kind: the others must not wait for this rank
        mine = _Introduction(None, error=said(e))
    payloads = links.exchange("rings", msgspec.msgpack.encode(mine), seconds)
    members = []
    for rank, payload in enumerate(payloads):
        other = msgspec.msgpack.decode(payload, type=_Introduction)
        proven = proven and other.proven
        if other.member is None:
            raise UpdateError(rank=rank, host=hosts[rank], stage="join", reason=other.error)
        members.append(other.member)
    met = b"1"
    try:
        collective.meet(members, at_once=not proven)
    except Exception as e:  # of any kind: the others are at the exchange below, or in the update
        if proven:
            raise
        log.info("rank %d cannot copy into the other ranks' rings, so all broadcast: %s", links.rank, e)
        met = b""
    if not proven and not all(links.exchange("neighbours", met, seconds)):
        collective.rest()
        return None
    lane.use(collective)
    return lane
