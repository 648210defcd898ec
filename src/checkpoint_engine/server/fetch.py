"""A pass whose bytes come from peers: read into host slots a few pieces ahead, and lifted from there as from regions.

Where the ring is host memory they are read straight into it, and there is nothing to lift."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from checkpoint_engine.devices.base import Device
from checkpoint_engine.devices.busy import Busy
from checkpoint_engine.errors import DeadlineError
from checkpoint_engine.manifest import RegionMeta
from checkpoint_engine.planning.plan import Bucket, Copy, Piece
from checkpoint_engine.server.pass_errors import PassError, Stopped
from checkpoint_engine.server.pipeline import SLICE, Pass
from checkpoint_engine.server.slots import RingSlot, Slot
from checkpoint_engine.server.supply import Supply, Want, wants_of
from checkpoint_engine.transport.messages import StageStats

READERS = 4
"""Threads, each of which reads one piece at a time."""
END_SECONDS = 3.0
"""For readers to end; a read that was stopped takes transport.peer.reading.GRACE at most."""


class Feed:
    """What a rank reads, and by what.

    regions   of this rank in the plan's manifest: the sources' regions, with the tensors that it reads or has
    own       number of a region in the plan -> its number among this rank's own, from which it is lifted without being read
    seconds   for one piece to be delivered
    device    None: there are slots; else what is read goes straight into this device's ring, which is host memory
    """

    def __init__(
        self, supply: Supply, regions: Sequence[RegionMeta], own: dict[int, int], seconds: float, device: Device | None = None
    ) -> None:
        self.supply, self.seconds, self.device = supply, seconds, device
        self._regions, self._own = regions, own

    @property
    def readers(self) -> int:
        return READERS if self.device is not None else min(READERS, len(self.supply.slots))

    def wants(self, piece: Piece) -> list[Want]:
        return [
            want
            for copy in piece.copies
            if copy.region not in self._own
            for want in wants_of(self._regions[copy.region].tensors, copy.source, copy.nbytes, copy.offset - piece.offset)
        ]

    def staged(self, piece: Piece, turn: int) -> Piece:
        """The piece as it is lifted, which is number `turn` of this rank's: its own regions are behind the slots, and what was
        read lies in its slot as it shall lie in the bucket, or is there already."""
        copies: list[Copy] = []
        slot = turn % (len(self.supply.slots) or 1)
        for copy in piece.copies:
            if (number := self._own.get(copy.region)) is not None:
                copies.append(Copy(len(self.supply.slots) + number, copy.source, copy.offset, copy.nbytes))
            elif self.device is not None:
                continue
            elif copies and copies[-1].region == slot:
                first = copies[-1]
                copies[-1] = Copy(slot, first.source, first.offset, copy.offset + copy.nbytes - first.offset)
            else:
                copies.append(Copy(slot, copy.offset - piece.offset, copy.offset, copy.nbytes))
        return Piece(piece.owner, piece.offset, piece.nbytes, tuple(copies))


class FetchPass(Pass):
    """regions: the slots' memory, then this rank's own. Pieces take slots in turn, each again when it was lifted from; without
    slots, their places in the ring when these are free."""

    def __init__(self, feed: Feed, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._feed = feed
        # The driver lifts what is in _own, in order; a piece gets there when its bytes are here.
        self._all: list[tuple[Bucket, Piece]] = self._own
        self._own = []
        self._turns = [i for i, number in self._plan.stream if self._plan.buckets[i].pieces[number].owner == self._lane.rank]
        self._fetched: set[int] = set()
        self._position = 0  # of the driver in the stream
        self._busy = Busy()
        self._read_bytes = 0

    def run(self) -> dict[str, StageStats]:
        readers = [
            threading.Thread(target=self._guard, args=("fetch", partial(self._fetch, first, count)), name="fetch", daemon=True)
            for count in [self._feed.readers]
            for first in range(count)
        ]
        for reader in readers:
            reader.start()
        try:
            return super().run()
        finally:
            if self._error is not None:
                self._feed.supply.stop()
            for reader in readers:  # one that is still connecting reads nothing any more
                reader.join(END_SECONDS)

    # --- readers -------------------------------------------------------------------------------------------------------

    def _fetch(self, first: int, step: int) -> None:
        for turn in range(first, len(self._all), step):
            bucket, piece = self._all[turn]
            wants = self._feed.wants(piece)
            if self._feed.device is not None:
                self._read_into_ring(self._feed.device, turn, bucket, piece, wants)
            else:
                slots = self._feed.supply.slots
                number = turn % len(slots)
                self._wait_lifted(turn - len(slots))
                self._read(turn, wants, slots[number])
                self._regions[number] = slots[number].tensor
            with self._state:
                self._fetched.add(turn)
                self._state.notify_all()

    def _read_into_ring(self, device: Device, turn: int, bucket: Bucket, piece: Piece, wants: Sequence[Want]) -> None:
        with self._state:
            while self._loaded <= bucket.after:
                if self._error is not None:
                    raise Stopped("stopped")
                self._state.wait(SLICE)
        start = bucket.offset + piece.offset
        with RingSlot(device, piece.nbytes, self._lane.ring.tensor[start : start + piece.nbytes]) as slot:
            try:
                self._read(turn, wants, slot)
            finally:
                if slot.quarantined:
                    self._lane.spoil()

    def _read(self, turn: int, wants: Sequence[Want], slot: Slot) -> None:
        since, nbytes = time.perf_counter(), sum(want.nbytes for want in wants)
        with self._busy:
            try:
                self._feed.supply.read(wants, slot, max(SLICE, min(self._feed.seconds, self._remaining())))
            except Exception:
                if self._error is not None:
                    raise Stopped("stopped") from None
                raise
        self._recorder.add("fetch", self._turns[turn], since, time.perf_counter(), nbytes)
        with self._state:
            self._read_bytes += nbytes

    def _wait_lifted(self, turn: int) -> None:
        """The slot's piece before has been copied from."""
        if turn < 0:
            return
        with self._state:
            while len(self._lifts) <= turn:
                if self._error is not None:
                    raise Stopped("stopped")
                self._state.wait(SLICE)
        while not self._lifts[turn].done.wait(SLICE):
            if self._error is not None:
                raise Stopped("stopped")

    # --- driver --------------------------------------------------------------------------------------------------------

    def _lift_ahead(self) -> None:
        with self._state:
            while (turn := len(self._own)) in self._fetched:
                bucket, piece = self._all[turn]
                self._own.append((bucket, self._feed.staged(piece, turn)))
        super()._lift_ahead()
        with self._state:
            self._state.notify_all()

    def _wait_loaded(self, bucket: int) -> None:
        """Called once for each piece of the stream, before it is lifted."""
        super()._wait_loaded(bucket)
        index, number = self._plan.stream[self._position]
        self._position += 1
        if self._plan.buckets[index].pieces[number].owner != self._lane.rank:
            return
        turn = len(self._shares)
        with self._state:
            while turn not in self._fetched and self._error is None:
                if not self._state.wait(SLICE) and self._overdue(False):
                    raise PassError("fetch", str(DeadlineError(f"the bytes of bucket {index}", self._seconds)))
            if self._error is not None:
                raise Stopped("stopped")

    def _stats(self) -> dict[str, StageStats]:
        return {"fetch": StageStats(self._read_bytes, self._busy.seconds), **super()._stats()}
