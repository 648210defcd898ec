"""Regions that outlive the checkpoints in them, so that the next one of the same shape finds its memory ready."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from checkpoint_engine.errors import CheckpointError
from checkpoint_engine.memory.region import HostRegion

Hook = Callable[[HostRegion], None]


def _nothing(region: HostRegion) -> None:
    pass


class RegionPool:
    """Gives out regions, and keeps those that are to be used again. A context manager; threads may share it.

    on_map      called for each region of new memory before its first page is taken: a device says from where
    on_create   called once for each region when its memory is there: a device registers it
    on_destroy  called once for each region that on_create was called for, before its memory is given back
    """

    def __init__(
        self, on_create: Hook = _nothing, on_destroy: Hook = _nothing, *, on_map: Hook = _nothing, threads: int = 4
    ) -> None:
        """threads: that take a new region's pages."""
        self._on_map, self._on_create, self._on_destroy, self._threads = on_map, on_create, on_destroy, threads
        self._lock = threading.Lock()
        self._kept: list[HostRegion] = []
        self._fresh: set[int] = set()  # generations of regions in use for the first time
        self._announced: set[int] = set()
        self._closed = False

    @property
    def kept_bytes(self) -> int:
        """Bytes of the regions that wait for use."""
        with self._lock:
            return sum(region.nbytes for region in self._kept)

    def acquire(self, nbytes: int) -> HostRegion:
        """A region of exactly `nbytes` bytes, ready to use: a kept one, else a new one. Its contents are arbitrary.

        Raises CheckpointError when there is not enough memory, and what on_create raised.
        """
        (region,) = self.acquire_all([nbytes])
        try:
            self.ready(region)
        except BaseException:
            self.undo([region])
            raise
        return region

    def acquire_all(self, sizes: Sequence[int], *, reuse: bool = True) -> list[HostRegion]:
        """Regions of exactly these sizes; new ones are untouched, and `ready` must be called for each before it is used
        by a device.

        reuse: use kept regions. When that is not enough, the kept ones that fit nothing are given back first: a
        checkpoint of another shape needs their memory. Raises CheckpointError when there is not enough memory.
        """
        found: list[HostRegion | None] = [self._take(size) if reuse else None for size in sizes]
        if reuse and None in found:
            self.drop()
        regions: list[HostRegion] = [region for region in found if region is not None]
        try:
            for place, region in enumerate(found):
                if region is None:
                    found[place] = region = self._new(HostRegion(sizes[place], touch=False))
                    regions.append(region)
                    self._on_map(region)
        except BaseException:
            self.undo(regions)
            raise
        return [region for region in found if region is not None]

    def map_file(self, path: str | Path) -> HostRegion:
        """A region over a file in place; `ready` as above. Never kept. Raises CheckpointError."""
        return self._new(HostRegion.map_file(path), kind="file")

    def ready(self, region: HostRegion) -> None:
        """Take the pages that are missing, and call on_create if it was not called yet."""
        region.touch_all(self._threads)
        with self._lock:
            if region.generation in self._announced:
                return
        self._on_create(region)
        with self._lock:
            self._announced.add(region.generation)

    def release(self, region: HostRegion, keep: bool) -> None:
        """The region is not in use any more. keep: for the next who wants one of its size."""
        with self._lock:
            self._fresh.discard(region.generation)
            if keep and not self._closed and not region.in_place and region.generation in self._announced:
                self._kept.append(region)
                return
        self._destroy([region])

    def undo(self, regions: Iterable[HostRegion]) -> None:
        """As if they had not been acquired: new ones are given back, kept ones are kept."""
        for region in regions:
            with self._lock:
                fresh = region.generation in self._fresh
            self.release(region, keep=not fresh)

    def drop(self) -> None:
        """Give the memory of all kept regions back."""
        with self._lock:
            kept, self._kept = self._kept, []
        self._destroy(kept)

    def close(self) -> None:
        """As drop; what is released from now on is given back."""
        with self._lock:
            self._closed = True
        self.drop()

    def _take(self, nbytes: int) -> HostRegion | None:
        with self._lock:
            for place, region in enumerate(self._kept):
                if region.nbytes == nbytes:
                    return self._kept.pop(place)
        return None

    def _new(self, region: HostRegion, kind: str = "memory") -> HostRegion:
        with self._lock:
            if not self._closed:
                self._fresh.add(region.generation)
                return region
        region.close()
        raise CheckpointError(f"no {kind} can be taken: the pool is closed")

    def _destroy(self, regions: Iterable[HostRegion]) -> None:
        for region in regions:
            with self._lock:
                announced = region.generation in self._announced
                self._announced.discard(region.generation)
            try:
                if announced:
                    self._on_destroy(region)
            finally:
                region.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
