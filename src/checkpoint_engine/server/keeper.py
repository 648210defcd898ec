"""What outlives an update: the lane and the communicator, and when each is made anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from checkpoint_engine.devices.base import Closing, Device
from checkpoint_engine.errors import AgreementError
from checkpoint_engine.planning.plan import Plan
from checkpoint_engine.planning.sharing import MAX_GROUPS, Shares
from checkpoint_engine.server.fleet import Fleet
from checkpoint_engine.server.lane import Lane, release_quarantined
from checkpoint_engine.server.report import Saved
from checkpoint_engine.transport.collective import StreamCollective


class Keeper(Closing):
    """generation: number of the communicator that this rank has or wants; the highest of all ranks is made. proven: the last
    update copied into other ranks' rings."""

    def __init__(self, fleet: Fleet, device: Device) -> None:
        self._fleet, self._device = fleet, device
        self._lane: Lane | None = None
        self.collective: StreamCollective | None = None
        self.generation = 0
        self._groups: set[tuple[int, ...]] = set()  # of that communicator, this rank's and others'
        self._made = 0  # groups of it so far
        self.proven = False

    @property
    def ring_bytes(self) -> int:
        """Of the ring that is there now; 0: none is."""
        lane = self._lane
        return 0 if lane is None else lane.ring_bytes

    def prepare(self, plan: Plan) -> Lane:
        """Have a lane of the plan's size. Raises ManifestError when there is no memory for it."""
        self.mend()
        if self._lane is not None and not self._lane.fits(plan):
            self._lane.close()
            self._lane = None
        if self._lane is None:
            self._lane = Lane(self._device, self._fleet.rank, plan.ring_bytes, plan.piece_bytes)
        return self._lane

    def mend(self) -> None:
        """Give up a lane whose communicator was abandoned, and memory that nobody writes to any more."""
        release_quarantined()
        if self._lane is not None and self._lane.damaged:
            self.free()

    def join(self, generation: int, seconds: float) -> Lane:
        """The prepared lane with communicator number `generation`, on which all ranks agreed. seconds: deadline of each of its
        broadcasts in this update. Raises DeadlineError, PeerLostError."""
        if self._lane is None:
            raise AgreementError("no lane was prepared")
        lane = self._lane
        if generation > self.generation or self.collective is None:
            if self.collective is not None:
                self.collective.close()
                self.collective = None
            self.generation, self._groups, self._made = generation, set(), 0
            self.collective = self._fleet.collective(self._device, generation)
        if self.collective is not None:
            self.collective.seconds = seconds
        lane.use(self.collective)
        return lane

    def group(self, groups: Sequence[tuple[int, ...]]) -> None:
        """Have those of these sub-groups that this rank is in, of the communicator that `join` gave; all ranks must ask for the
        same ones. Others are kept while no rank is in too many. Raises as `join`."""
        whole = self.collective
        if whole is None:
            return
        if max(Counter(rank for each in self._groups.union(groups) for rank in each).values(), default=0) > MAX_GROUPS:
            kept = self._groups.intersection(groups)
            for members in [each for each in whole.groups if each not in kept]:
                whole.groups.pop(members).close()
            self._groups = kept
        for members in groups:
            if members not in self._groups:
                self._made += 1  # on all ranks: who is not a member counts it too
                if self._fleet.rank in members:
                    whole.groups[members] = self._fleet.group(self._device, self.generation, self._made, members)
                self._groups.add(members)
        for group in whole.groups.values():
            group.seconds = whole.seconds

    def saved(self, shares: Shares | None) -> Saved:
        """What an update that was shared like this tells of it."""
        groups = self.collective.groups if self.collective is not None else {}
        memory = sum(group.memory for group in groups.values())
        return Saved(group_bytes=memory) if shares is None else Saved(shares.unsent, len(shares.groups), memory)

    def skip(self, generation: int) -> None:
        """Never make communicator number `generation` again: the store holds what was written for it, and some rank may have
        joined it. Nor use one that is kept: ranks that did not fail make the next one, and wait for this rank there."""
        if self.collective is not None:
            self.collective.close()
            self.collective = None
        self.generation = max(self.generation, generation) + 1

    def settle(self, ring_bytes: int) -> None:
        """After a good update: give back what is not worth keeping. `ring_bytes`: of a ring that no tensor enlarged."""
        lane = self._lane
        if lane is not None and not (self._device.keeps_rings and lane.ring_bytes <= ring_bytes):
            lane.close()
            self._lane = None

    def free(self) -> None:
        """Give lane and communicator back. The next communicator has another number, on all ranks."""
        if self._lane is not None:
            self._lane.close()
            self._lane = None
        if self.collective is not None:
            self.collective.close()
            self.collective = None
            self.generation += 1

    close = free
