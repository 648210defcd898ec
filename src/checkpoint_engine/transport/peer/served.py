"""The regions that a source serves, and the leases on them: a region is given up only when nobody has it open."""

from __future__ import annotations

import collections
import ctypes
import functools
import itertools
import os
import secrets
import threading
import time
from dataclasses import dataclass, field

from checkpoint_engine.errors import DeadlineError, RegionGoneError, SettingsError
from checkpoint_engine.memory.region import HostRegion
from checkpoint_engine.transport.peer.base import RegionOffer

GENERATION_BITS = 53
"""What survives JSON readers that know floating point numbers only."""


@dataclass(eq=False)
class Served:
    """A region as the source serves it. fd is its own duplicate, and `memory` keeps its mapping: both are there for as long
    as this is, whatever becomes of the region object. address: of its first
    byte, in this process."""

    offer: RegionOffer
    fd: int
    address: int
    memory: object
    tickets: dict[str, bytes] = field(default_factory=dict)
    leases: collections.Counter[str] = field(default_factory=collections.Counter)  # by reader
    leaving: bool = False

    @functools.cached_property
    def view(self) -> memoryview:
        """Its bytes, to be read."""
        return memoryview((ctypes.c_char * self.offer.nbytes).from_address(self.address)).cast("B").toreadonly()


class RegionTable:
    """Threads share it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._regions: dict[int, Served] = {}
        self._numbers = itertools.count()
        self._closed = False

    def prepare(self, region: HostRegion) -> Served:
        """A region that nobody can lease before `publish`. Raises CheckpointError when it is closed."""
        tensor = region.tensor
        offer = RegionOffer(next(self._numbers), 1 + secrets.randbelow((1 << GENERATION_BITS) - 1), region.nbytes)
        return Served(offer, os.dup(region.fd), tensor.data_ptr(), tensor)

    def publish(self, served: Served) -> None:
        """Raises SettingsError when the table is closed."""
        with self._changed:
            if self._closed:
                raise SettingsError("the peer server is closed")
            self._regions[served.offer.region] = served

    def offers(self) -> tuple[RegionOffer, ...]:
        with self._changed:
            return tuple(served.offer for served in self._regions.values() if not served.leaving)

    def lease(self, region: int, generation: int, reader: str) -> Served:
        """Until `release`. Raises RegionGoneError when there is no such region, or it is being given up."""
        with self._changed:
            served = self._regions.get(region)
            if served is None or served.leaving:
                raise RegionGoneError("this server", "open", "it is not served any more", region)
            if served.offer.generation != generation:
                raise RegionGoneError("this server", "open", "another region is served in its place", region)
            served.leases[reader] += 1
            return served

    def release(self, served: Served, reader: str) -> None:
        with self._changed:
            served.leases[reader] -= 1
            if served.leases[reader] <= 0:
                del served.leases[reader]
            self._changed.notify_all()

    def withdraw(self, offer: RegionOffer, seconds: float) -> Served | None:
        """Lease it to nobody any more, and wait until nobody has it open; None when it was not served.

        Raises DeadlineError naming the readers that still have it open after `seconds`; it is then served as before.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            served = self._regions.get(offer.region)
            if served is None or served.offer != offer:
                return None
            served.leaving = True
            while served.leases:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                    served.leaving = False
                    readers = ", ".join(sorted(served.leases))
                    raise DeadlineError(f"{readers} to stop reading region {offer.region}", seconds)
            return self._regions.pop(offer.region, None)  # None: another call was first

    def close(self) -> tuple[RegionOffer, ...]:
        """Publish nothing any more; what is left to be withdrawn."""
        with self._changed:
            self._closed = True
            return tuple(served.offer for served in self._regions.values())
