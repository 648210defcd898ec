"""Updates without a ring: on one host, workers map all ranks' regions and load, or pull, from there.

There is nothing to lift, because host memory is device memory or read by the device itself, and nothing to share, because every
process of the host can map every region. Ranks that cannot open each other's descriptors (other users, other PID namespaces)
broadcast instead.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from checkpoint_engine.devices.base import Closing, Device, SharedHandle
from checkpoint_engine.manifest import Manifest, hex_digest
from checkpoint_engine.memory.region import HostRegion
from checkpoint_engine.planning.mapped import Grouped, grouped, mapped_items
from checkpoint_engine.planning.plan import Plan
from checkpoint_engine.recent import Recent
from checkpoint_engine.server.pipeline import Pass
from checkpoint_engine.transport.channel import MAX_DESCRIPTORS
from checkpoint_engine.transport.descriptors import SharedDescriptor
from checkpoint_engine.transport.messages import Attach, StageStats, Table

PULLED_BUCKETS = 8
"""That a device pulls at a time, at most. What its loader must get instead of a replay is copied there meanwhile."""
KEPT_PLANS = 4


def describe(regions: Sequence[HostRegion]) -> tuple[SharedDescriptor, ...] | None:
    """None when one of them is a file in place, which cannot be sealed: its owner could shrink it under a reader."""
    if any(region.in_place for region in regions):
        return None
    return tuple(SharedDescriptor.of(r.fd, r.nbytes) for r in regions)


class OpenRegions(Closing):
    """Descriptors of all ranks' regions, in the order of planning.mapped.region_numbers.

    writable: as registering with a GPU needs it. Raises OSError when one cannot be opened, or is not the one that was announced.
    """

    def __init__(self, regions: Sequence[SharedDescriptor], manifest: Manifest, *, writable: bool = False) -> None:
        self.manifest = manifest
        self.handles = tuple(SharedHandle("region", region.nbytes) for region in regions)
        self.descriptors: tuple[int, ...] = ()
        if len(regions) >= MAX_DESCRIPTORS:  # a ring may need one beside them
            raise OSError(f"{len(regions)} regions are more than a message can carry")
        try:
            for region in regions:
                self.descriptors += (region.open(os.O_RDWR if writable else os.O_RDONLY),)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = ()


class Grouping:
    """How a device pulls the buckets of plans: many of them at a time, for launches and the messages about them add up."""

    def __init__(self, device: Device) -> None:
        self._together = 0 if device.kind == "cpu" else PULLED_BUCKETS
        self._kept: Recent[str, Grouped] = Recent(KEPT_PLANS)  # by the plan's digest

    def of(self, plan: Plan) -> Grouped:
        return self._kept.of(plan.digest, lambda: grouped(plan, self._together * plan.bucket_bytes))


class MappedPass(Pass):
    """A pass whose buckets are all there from the start: they only have to be loaded."""

    def __init__(self, source: OpenRegions, grouping: Grouping, plan: Plan, *args: Any, **options: Any) -> None:
        pulled, self._groups = grouping.of(plan)
        super().__init__(pulled, *args, **options)
        self._source, self._shared_plan = source, plan

    def run(self) -> dict[str, StageStats]:
        stats = super().run()
        if len(self._groups) < len(self._shared_plan.buckets):
            self.heard.needs = b""  # of groups, not of buckets
        return stats

    def _drive(self) -> None:
        for index in range(len(self._plan.buckets)):
            self._arrived.put((index, None))

    def _attachment(self) -> tuple[Attach, tuple[int, ...]]:
        regions = [len(rank.regions) for rank in self._source.manifest.ranks]  # by which they are numbered
        digest = f"mapped-{hex_digest(repr((self._shared_plan.digest, regions, self._groups)).encode())}"
        tables = None
        if digest not in self._known:
            located = mapped_items(self._shared_plan, self._source.manifest)
            tables = tuple(Table(0, 0, tuple(i for n in group for i in located[n])) for group in self._groups)
        return Attach(self._lane.rank, self._source.handles, digest, tables), self._source.descriptors

    def _stats(self) -> dict[str, StageStats]:
        return self._load_stats()
