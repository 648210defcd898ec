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


def level(inbox: Inbox, links: Links, lane: Lane, plan: Plan, dirty: bool, reason: str) -> None:
    """Bring all ranks' communicators to the same broadcast; without every rank's word, give the communicator up.

    reason: for workers that come now. No thread of this rank's may queue broadcasts any more, unless the lane is damaged.
    """
    deadline = time.monotonic() + LEVEL_SECONDS
    links.tell(Stopped(inbox.update, lane.posted, dirty))
    posted: dict[int, int] = {}
    while len(posted) < links.world_size and not links.lost:
        if (entry := inbox.get(deadline - time.monotonic())) is None:
            break
        if isinstance(entry[1], Stopped):
            posted[entry[0]] = entry[1].posted
        elif isinstance(entry[1], WorkerCame):
            entry[1].send_off(reason)
    complete = len(posted) == links.world_size and not lane.damaged
    if not complete or not lane.level(plan, max(posted.values()), max(0.1, deadline - time.monotonic())):
        log.warning("rank %d: giving up the communicator; the next update makes a new one", links.rank)
        lane.abandon()
    lane.finish_lifts(LEVEL_SECONDS)
