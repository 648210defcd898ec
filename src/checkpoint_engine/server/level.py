"""How the ranks stop together after a failure: at the same broadcast, or without the communicator."""

from __future__ import annotations

import logging
import time

from checkpoint_engine.planning.plan import Plan
from checkpoint_engine.planning.sharing import Shares
from checkpoint_engine.server.events import WorkerCame
from checkpoint_engine.server.lane import Lane
from checkpoint_engine.transport.links import Inbox, Links
from checkpoint_engine.transport.meeting import LEADER
from checkpoint_engine.transport.messages import CommitPass, End, Failure, Lost, Stopped

log = logging.getLogger(__name__)
UNQUIET = -1
"""`Stopped.posted` of a rank that may still write to other ranks' rings."""


def level(inbox: Inbox, links: Links, lane: Lane, plan: Plan, shares: Shares | None, reason: str, seconds: float) -> None:
    """Bring all ranks to the same broadcast, with nothing under way; without every rank's word, give the communicator up.

    shares: of the update's first stream. reason: for workers that come now. seconds: how long the others' answer and the
    broadcasts in flight may take. No thread of this rank's may queue broadcasts any more, unless the lane is damaged.
    """
    deadline = time.monotonic() + seconds
    quiet = lane.quiet(seconds)
    links.tell(Stopped(inbox.update, lane.posted if quiet else UNQUIET))
    posted = _hear(inbox, links, lane, deadline, reason)
    missing = {rank for rank in range(links.world_size) if posted.get(rank, UNQUIET) == UNQUIET}
    if missing or lane.damaged or not lane.level(plan, shares, max(posted.values()), max(0.1, deadline - time.monotonic())):
        log.warning("rank %d: giving up the communicator; the next update makes a new one", links.rank)
        in_doubt = frozenset(missing)
        by_copies = not lane.in_step  # else a library's own threads may write, and a rank's word is not enough
        lane.abandon(missing, (lambda: all(links.has_stopped(r, inbox.update) for r in in_doubt)) if by_copies else None)
    lane.finish_lifts(seconds)


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


def await_verdict(inbox: Inbox, seconds: float) -> CommitPass | End | None:
    """What the leader had told this rank before it stopped: to commit, or that the update is over; None: neither, as far as can
    be known within `seconds`.

    Its messages come in order: none follows its Stopped, nor its death. What else comes stays in the inbox.
    """
    deadline, kept = time.monotonic() + seconds, []
    try:
        while (entry := inbox.get(deadline - time.monotonic())) is not None:
            sender, event = entry
            if isinstance(event, CommitPass | End):
                return event
            kept.append(entry)
            if sender == LEADER and isinstance(event, Stopped | Lost):
                break
        return None
    finally:
        for entry in kept:
            inbox.put(*entry)


def telling(failure: Failure) -> tuple[bool, int, str, str]:
    """The most telling failure first: a stage's own before what follows from it elsewhere."""
    return failure.stage in ("request", "update"), failure.rank, failure.stage, failure.reason
