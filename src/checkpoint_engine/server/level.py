"""How the ranks stop together after a failure: at the same broadcast, or without the communicator."""

from __future__ import annotations

import logging
import time

from checkpoint_engine.planning.plan import Plan
from checkpoint_engine.server.events import WorkerCame
from checkpoint_engine.server.lane import Lane
from checkpoint_engine.transport.links import Inbox, Links
from checkpoint_engine.transport.messages import Stopped

log = logging.getLogger(__name__)
LEVEL_SECONDS = 5.0
"""After a failure: how long the others' answer and the broadcasts in flight may take before the communicator is given up."""


UNQUIET = -1
"""`Stopped.posted` of a rank that may still write to other ranks' rings."""


def level(inbox: Inbox, links: Links, lane: Lane, plan: Plan, dirty: bool, reason: str) -> None:
    """Bring all ranks to the same broadcast, with nothing under way; without every rank's word, give the communicator up.

    reason: for workers that come now. No thread of this rank's may queue broadcasts any more, unless the lane is damaged.
    """
    deadline = time.monotonic() + LEVEL_SECONDS
    quiet = lane.quiet(LEVEL_SECONDS)
    links.tell(Stopped(inbox.update, lane.posted if quiet else UNQUIET, dirty))
    posted = _hear(inbox, links, lane, deadline, reason)
    missing = {rank for rank in range(links.world_size) if posted.get(rank, UNQUIET) == UNQUIET}
    if missing or lane.damaged or not lane.level(plan, max(posted.values()), max(0.1, deadline - time.monotonic())):
        log.warning("rank %d: giving up the communicator; the next update makes a new one", links.rank)
        lane.abandon(missing)
    lane.finish_lifts(LEVEL_SECONDS)


def _hear(inbox: Inbox, links: Links, lane: Lane, deadline: float, reason: str) -> dict[int, int]:
    """What each rank had posted when it stopped. A communicator is given up as soon as one rank is lost; where ranks copy
    for themselves, the others' word is waited for."""
    posted: dict[int, int] = {}
    while len(posted) < links.world_size:
        lost = links.lost
        if lost and (lane.in_step or all(rank in posted or rank in lost for rank in range(links.world_size))):
            break
        if (entry := inbox.get(deadline - time.monotonic())) is None:
            break
        if isinstance(entry[1], Stopped):
            posted[entry[0]] = entry[1].posted
        elif isinstance(entry[1], WorkerCame):
            entry[1].send_off(reason)
    return posted
