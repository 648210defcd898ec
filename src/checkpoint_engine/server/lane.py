"""What a pass runs on: the ring, the staging slots, two streams and the communicator. Kept from update to update."""

from __future__ import annotations

import contextlib
import logging

import torch

from checkpoint_engine.devices.base import Closing, Device, Event, Ring
from checkpoint_engine.planning.plan import Bucket, Piece, Plan
from checkpoint_engine.transport.collective import Collective

log = logging.getLogger(__name__)
_quarantine: list[contextlib.ExitStack] = []
"""Memory that an abandoned communicator may still write to: it stays allocated while this process lives."""


class Lane(Closing):
    """Owns device memory and streams for plans with up to `ring_bytes` of ring and `piece_bytes` of staging slot.

    collective: not owned; None in a world of one. posted: broadcasts queued so far in this update. All ranks queue the same
    ones in the same order, so after a failure they can be brought level.
    """

    def __init__(self, device: Device, rank: int, ring_bytes: int, piece_bytes: int, world_size: int) -> None:
        self.device, self.rank = device, rank
        self.ring_bytes, self.piece_bytes = ring_bytes, piece_bytes
        self.collective: Collective | None = None
        self.posted = 0
        self.damaged = False
        self._stopped = True
        with contextlib.ExitStack() as memory:
            self.ring: Ring = memory.enter_context(device.allocate_ring(ring_bytes))
            slots = device.staging_slots if world_size > 1 else 0
            self.staging = [memory.enter_context(device.allocate(piece_bytes)).tensor for _ in range(slots)]
            self.lifting = device.stream("lift")
            self.sharing = device.stream("share")
            self._memory = memory.pop_all()

    def fits(self, plan: Plan) -> bool:
        return not self.damaged and self.ring_bytes == plan.ring_bytes and self.piece_bytes == plan.piece_bytes

    def lift(self, bucket: Bucket, piece: Piece, slot: torch.Tensor | None, regions: list[torch.Tensor]) -> tuple[Event, Event]:
        """Queue the piece's copies from the regions into a staging slot, or (None) straight to its place in the ring."""
        target, base = (self.ring.tensor, bucket.offset) if slot is None else (slot, -piece.offset)
        start = self.lifting.record()
        for c in piece.copies:
            at = base + c.offset
            self.lifting.copy(target[at : at + c.nbytes], regions[c.region][c.source : c.source + c.nbytes])
        return start, self.lifting.record()

    def share(self, bucket: Bucket, piece: Piece, lifted: Event | None, slot: torch.Tensor | None) -> tuple[Event, Event]:
        """Queue the piece's broadcast, behind its lift on the rank that owns it."""
        place = bucket.offset + piece.offset
        view = self.ring.tensor[place : place + piece.nbytes]
        if lifted is not None:
            self.sharing.after(lifted)
        start = self.sharing.record()
        self._broadcast(view, None if slot is None else slot[: piece.nbytes], piece.owner)
        return start, self.sharing.record()

    def _broadcast(self, target: torch.Tensor, source: torch.Tensor | None, owner: int) -> None:
        if self.collective is not None:
            self.collective.broadcast(target, source, owner, self.sharing)
        self.posted += 1

    def level(self, plan: Plan, target: int, seconds: float) -> bool:
        """After a failure: queue broadcasts until `target` are queued, as on all other ranks, and wait for them. What they
        carry does not matter any more. False when that did not end within `seconds`, or failed."""
        try:
            while self.posted < target:
                index, number = plan.stream[self.posted % len(plan.stream)]
                bucket = plan.buckets[index]
                piece = bucket.pieces[number]
                place = bucket.offset + piece.offset
                self._broadcast(self.ring.tensor[place : place + piece.nbytes], None, piece.owner)
            return self.sharing.record().wait(seconds)
        except Exception as e:  # whatever a broken communicator raises, it means one thing here
            log.warning("rank %d: the communicator could not be brought level: %s", self.rank, e)
            return False

    def finish_lifts(self, seconds: float) -> None:
        """Wait for what still reads the regions: their owner may unregister them next."""
        with contextlib.suppress(Exception):  # what failed reads no more
            if not self.lifting.record().wait(seconds):
                log.warning("rank %d: copies from host memory still run after %g s", self.rank, seconds)

    def abandon(self) -> None:
        """Give up the communicator, and with it all memory that it may still write to."""
        self.damaged = True
        if self.collective is not None:
            self._stopped = self.collective.abandon()

    def close(self) -> None:
        self.lifting.close()
        self.sharing.close()
        if not self._stopped:  # late arrivals could write into memory that is somebody else's by then
            _quarantine.append(self._memory)
        else:
            self._memory.close()
