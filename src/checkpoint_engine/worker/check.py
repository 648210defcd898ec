"""What a worker is about to load, checked against the digests that its owners made when they registered it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from checkpoint_engine.devices.base import Closing, Device
from checkpoint_engine.devices.digests import Layout, Run, Verifier
from checkpoint_engine.devices.host_digests import AtWork, HostVerifier
from checkpoint_engine.errors import IntegrityError, ProtocolError
from checkpoint_engine.recent import Recent
from checkpoint_engine.transport.messages import Attach, Table

KEPT_LAYOUTS = 4
AHEAD = 8
"""Buckets that are checked while earlier ones are loaded, where host memory is checked in threads."""

_layouts: Recent[str, Layout] = Recent(KEPT_LAYOUTS)  # by the digest of a plan's tables


class Check(Closing):
    """The check of one stream: for each bucket `begin`, then `before_load`; `finish` after the last. This one checks nothing.

    ahead    how many buckets may be begun before the first of them is loaded
    seconds  at work, nbytes: checked; when all is over
    sums     of the slices that were asked for (worker.slices); when all is over
    """

    ahead = 1
    seconds = 0.0
    nbytes = 0
    sums = b""

    def begin(self, bucket: int, items: Sequence[int] | None) -> None:
        """Its bytes are there. items: numbers of those of its tensors that any byte is taken of; None: perhaps of all."""

    def before_load(self, bucket: int) -> None:
        """Raises IntegrityError where it is known by now that the bucket is not what was registered."""

    def loaded(self, bucket: int) -> None:
        """It is loaded, or that is queued."""

    def finish(self) -> None:
        """Raises IntegrityError when any bucket was not."""

    def close(self) -> None:
        pass


class HostCheck(Check):
    """Of host memory: a bucket that is not what was registered never gets to the loader."""

    ahead = AHEAD

    def __init__(self, verifier: HostVerifier, tables: Sequence[Table], seconds: float) -> None:
        self._verifier, self._tables, self._patience = verifier, tables, seconds

    def begin(self, bucket: int, items: Sequence[int] | None) -> None:
        self._verifier.begin(bucket, items)

    def before_load(self, bucket: int) -> None:
        if wrong := self._verifier.mismatches(bucket, self._patience):
            raise IntegrityError([self._tables[bucket].items[found.item].name for found in wrong])

    def finish(self) -> None:
        self.seconds, self.nbytes = self._verifier.seconds, self._verifier.nbytes

    def close(self) -> None:
        self._verifier.close()


class DeviceCheck(Check):
    """Of a device's memory: queued before the load, on the stream that the loader uses; the answer comes after the last one."""

    def __init__(
        self, verifier: Verifier, tables: Sequence[Table], device: Device, seconds: float, at_work: AtWork | None = None
    ) -> None:
        self._verifier, self._tables, self._device, self._patience = verifier, tables, device, seconds
        self._at_work = at_work
        self._items: dict[int, frozenset[int] | None] = {}

    def begin(self, bucket: int, items: Sequence[int] | None) -> None:
        self._items[bucket] = None if items is None else frozenset(items)

    def before_load(self, bucket: int) -> None:
        if (items := self._items.setdefault(bucket, None)) is None or items:  # then of all its tensors: it is one launch
            start = time.perf_counter()
            self._verifier.check(bucket)
            self._spend(start, bucket)

    def finish(self) -> None:
        start = time.perf_counter()
        wrong = self._verifier.mismatches(self._device, self._patience)
        self._spend(start)
        self.nbytes = self._verifier.nbytes(self._items)
        if names := [self._tables[b].items[n].name for b, n in wrong if (items := self._items[b]) is None or n in items]:
            raise IntegrityError(names)

    def _spend(self, start: float, bucket: int = -1) -> None:
        """On the host: queueing, and waiting at the end."""
        now = time.perf_counter()
        self.seconds += now - start
        if self._at_work is not None:
            self._at_work(bucket, start, now, 0)


def make_check(
    attach: Attach,
    tables: Sequence[Table],
    memories: Sequence[torch.Tensor],
    device: Device,
    seconds: float,
    at_work: AtWork | None = None,
) -> Check:
    """The check that `attach` asks for. seconds: for a bucket's digests to be made, and for the device to end. at_work: see
    HostVerifier.

    Raises ProtocolError when digests, tables and memories do not fit each other.
    """
    if not attach.digests:
        return Check()
    layout = _layout(attach.plan, tables)
    if len(attach.digests) != 8 * len(layout.runs):
        raise ProtocolError(f"the server sent {len(attach.digests)} bytes of digests for {len(layout.runs)} tensors")
    _check_places(layout, memories)
    if all(memory.device.type == "cpu" for memory in memories):
        return HostCheck(HostVerifier(layout, attach.digests, memories, at_work=at_work), tables, seconds)
    return DeviceCheck(Verifier(layout, attach.digests, memories), tables, device, seconds, at_work)


def _layout(plan: str, tables: Sequence[Table]) -> Layout:
    return _layouts.of(plan, lambda: Layout([Run(i.memory, t.offset + i.offset, i.nbytes) for i in t.items] for t in tables))


def _check_places(layout: Layout, memories: Sequence[torch.Tensor]) -> None:
    memory, offset, nbytes = layout.table.unbind(1)
    held = nbytes > 0
    sizes = torch.tensor([each.numel() for each in memories] or [0])
    known = (memory >= 0) & (memory < len(sizes))
    inside = known & (offset >= 0) & (offset + nbytes <= sizes[memory.clamp(0, len(sizes) - 1)])
    if not bool((inside | ~held).all()):
        raise ProtocolError("the server's tables do not fit its memory")
