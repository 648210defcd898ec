"""What a pass runs on: the ring, the staging slots, two streams and the communicator. Kept from update to update."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection

import torch

from checkpoint_engine.devices.base import Closing, Device, Event, Ring
from checkpoint_engine.planning.plan import Bucket, Piece, Plan
from checkpoint_engine.planning.sharing import Shares
from checkpoint_engine.transport.collective import Collective, Ranks

log = logging.getLogger(__name__)
_quarantine: list[tuple[Callable[[], bool], contextlib.ExitStack]] = []
"""Memory that other ranks, or an abandoned communicator, may still write to: allocated until the function says that nobody can
any more, or while this process lives."""


def release_quarantined() -> None:
    """Give back what nobody can write to any more."""
    for entry in [entry for entry in _quarantine if entry[0]()]:
        _quarantine.remove(entry)
        entry[1].close()


class Lane(Closing):
    """Owns device memory and streams for plans with up to `ring_bytes` of ring and `piece_bytes` of staging slot.

    collective: not owned; None in a world of one. staging: slots to lift into; empty: lift straight into the ring. reached:
    broadcasts of this update that are behind this rank, queued or none of its business; posted: of them, up to the last that it
    queued. All ranks queue theirs in the same order, so after a failure they can be brought level.
    """

    def __init__(self, device: Device, rank: int, ring_bytes: int, piece_bytes: int) -> None:
        self.device, self.rank = device, rank
        self.ring_bytes, self.piece_bytes = ring_bytes, piece_bytes
        self.collective: Collective | None = None
        self.posted = self.reached = 0
        self.damaged = False
        self.staging: list[torch.Tensor] = []
        self._slots: list[torch.Tensor] = []  # allocated for staging, in use or not
        self._stopped = True
        self._over: Callable[[], bool] = lambda: False
        with contextlib.ExitStack() as memory:
            self.ring: Ring = memory.enter_context(device.allocate_ring(ring_bytes))
            self.lifting = device.stream("lift")
            self.sharing = device.stream("share")
            self._memory = memory.pop_all()

    @property
    def method(self) -> str:
        """How ranks share, for reports: "copies" or "broadcast"."""
        return "broadcast" if self.collective is None or self.collective.in_step else "copies"

    @property
    def in_step(self) -> bool:
        """Whether after a failure all ranks must be brought to the same broadcast."""
        return self.collective is not None and self.collective.in_step

    def fits(self, plan: Plan) -> bool:
        return not self.damaged and self.ring_bytes == plan.ring_bytes and self.piece_bytes == plan.piece_bytes

    def use(self, collective: Collective | None) -> None:
        """For the next update. Raises ManifestError when there is no memory for staging that it wants."""
        self.collective, self.posted, self.reached = collective, 0, 0
        slots = self.device.staging_slots if collective is not None and collective.staged else 0
        while len(self._slots) < slots:
            self._slots.append(self._memory.enter_context(self.device.allocate(self.piece_bytes)).tensor)
        self.staging = self._slots[:slots]

    def lift(self, bucket: Bucket, piece: Piece, slot: torch.Tensor | None, regions: list[torch.Tensor]) -> tuple[Event, Event]:
        """Queue the piece's copies from the regions into a staging slot, or (None) straight to its place in the ring."""
        target, base = (self.ring.tensor, bucket.offset) if slot is None else (slot, -piece.offset)
        start = self.lifting.record()
        for c in piece.copies:
            at = base + c.offset
            self.lifting.copy(target[at : at + c.nbytes], regions[c.region][c.source : c.source + c.nbytes])
        return start, self.lifting.record()

    def share(self, bucket: Bucket, piece: Piece, lifted: Event | None, slot: torch.Tensor | None, ranks: Ranks = None) -> Event:
        """Queue the piece's broadcast to `ranks`, behind its lift on its owner. Returns the event of its arrival here."""
        return self._broadcast(bucket, piece, None if slot is None else slot[: piece.nbytes], lifted, ranks)

    def skip(self, piece: Piece) -> None:
        """In place of `share`, where this rank takes no part."""
        self.reached += 1
        if self.collective is not None:
            self.collective.skip(piece.owner)

    def _broadcast(self, bucket: Bucket, piece: Piece, source: torch.Tensor | None, lifted: Event | None, ranks: Ranks) -> Event:
        place = bucket.offset + piece.offset
        target = self.ring.tensor[place : place + piece.nbytes]
        self.reached += 1
        self.posted = self.reached
        if self.collective is not None:
            return self.collective.broadcast(target, source, piece.owner, self.sharing, lifted, ranks)
        return lifted or self.lifting.record()

    def rest(self) -> None:
        """A pass has ended well on this rank."""
        if self.collective is not None:
            self.collective.rest()

    def quiet(self, seconds: float) -> bool:
        """After a failure, before this rank says that it stopped; see Collective."""
        return self.collective is None or self.collective.quiet(self.sharing, seconds)

    def level(self, plan: Plan, shares: Shares | None, target: int, seconds: float) -> bool:
        """After a failure: queue broadcasts until all of this rank's among the first `target` are queued, as on all other ranks,
        and wait for them. What they carry does not matter any more. False when that did not end within `seconds`, or failed.

        shares: who takes part in those of the update's first stream; None: all."""
        if not self.in_step:
            return True
        try:
            while self.reached < target:
                index, number = plan.stream[self.reached % len(plan.stream)]
                bucket = plan.buckets[index]
                piece = bucket.pieces[number]
                ranks = None if shares is None or self.reached >= len(plan.stream) else shares.ranks(index)
                if ranks is None or self.rank in ranks:
                    self._broadcast(bucket, piece, None, None, ranks)
                else:
                    self.skip(piece)
            return self.sharing.record().wait(seconds)
        except Exception as e:  # whatever a broken communicator raises, it means one thing here
            log.warning("rank %d: the communicator could not be brought level: %s", self.rank, e)
            return False

    def finish_lifts(self, seconds: float) -> None:
        """Wait for what still reads the regions: their owner may unregister them next."""
        with contextlib.suppress(Exception):  # what failed reads no more
            if not self.lifting.record().wait(seconds):
                log.warning("rank %d: copies from host memory still run after %g s", self.rank, seconds)

    def abandon(self, missing: Collection[int] = (), over: Callable[[], bool] | None = None) -> None:
        """Give up the communicator, and with it all memory that it may still write to. missing: ranks that did not say that
        they stopped; over: whether they have since. A second time takes nothing back."""
        self.damaged = True
        if over is not None:
            self._over = over
        if self.collective is not None:
            self._stopped = self.collective.abandon(missing) and self._stopped

    def spoil(self) -> None:
        """Something that nobody waits for may still write to the ring: it is neither used again nor given back."""
        self.damaged, self._stopped = True, False

    def close(self) -> None:
        self.lifting.close()
        self.sharing.close()
        if not (self._stopped or self._over()):  # late arrivals could write into memory that is somebody else's by then
            _quarantine.append((self._over, self._memory))
        else:
            self._memory.close()
