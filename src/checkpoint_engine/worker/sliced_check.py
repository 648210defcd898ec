"""The check of workers that replay: of most tensors only the slices that were taken, where they landed."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from checkpoint_engine.devices.base import Device
from checkpoint_engine.devices.host_digests import AtWork
from checkpoint_engine.errors import DeadlineError, ProtocolError
from checkpoint_engine.loads.moves import Move
from checkpoint_engine.memory.checksum import packed
from checkpoint_engine.planning.slices import Taken
from checkpoint_engine.recent import Recent
from checkpoint_engine.transport.messages import Attach, Table
from checkpoint_engine.worker.check import Check
from checkpoint_engine.worker.slices import Asked, Piece, Replaying, SliceSums, Sums

if TYPE_CHECKING:
    from checkpoint_engine.loads.slice_kernel import SliceTable

KEPT = 4
"""Of what was asked for with the tensors in the ring's buckets, and in the regions'; and of the descriptors for one load plan."""

_asked: Recent[tuple[str, str, bytes], Asked] = Recent(KEPT)  # by plan, name, items
_tables: weakref.WeakKeyDictionary[Replaying, dict[Asked, SliceTable]] = weakref.WeakKeyDictionary()


class DeviceSliceSums(Sums):
    """Made by a kernel: where slices landed, beside the replays of further buckets, on a stream of its own."""

    def __init__(self, asked: Asked, replaying: Replaying | None, memories: Sequence[torch.Tensor], device: Device) -> None:
        """memories: the servers'; on the device, unless something is replayed. Raises ImportError where there is no Triton."""
        super().__init__(asked, replaying)
        self._device = device
        where = (replaying.storages if replaying is not None else memories)[0].device
        self._side = torch.cuda.Stream(where) if where.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._totals = torch.zeros(len(asked.items), dtype=torch.int64, device=where)
        if replaying is None:
            self._table = _table([asked.there(b, memories) for b in range(len(asked.firsts))], asked, where)
            return
        kept = _tables.setdefault(replaying, {})
        if asked not in kept:
            while len(kept) >= KEPT:
                del kept[next(iter(kept))]
            kept[asked] = _table([asked.here(b, replaying) for b in range(len(asked.firsts))], asked, where)
        self._table = kept[asked]

    def arrived(self, bucket: int, memories: Sequence[torch.Tensor], seconds: float) -> None:
        if self._replaying is None:
            self._add(bucket)

    def landed(self, bucket: int) -> None:
        if self._replaying is None:
            return
        if self._side is None:
            self._add(bucket)
            return
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        with torch.cuda.stream(self._side):
            self._add(bucket)

    def _add(self, bucket: int) -> None:
        start = time.perf_counter()
        self._table.add(bucket, self._totals)
        self.nbytes += self._table.nbytes[bucket]
        self.seconds += time.perf_counter() - start

    def finish(self, seconds: float) -> bytes:
        start = time.perf_counter()
        with torch.cuda.stream(self._side) if self._side is not None else contextlib.nullcontext():
            over = self._device.mark()
        if not over.wait(seconds):
            raise DeadlineError(f"{self._device.name} to sum up slices", seconds)
        found = packed(self._totals)
        self.seconds += time.perf_counter() - start
        return found

    def close(self) -> None:
        if self._side is not None:  # what is still to be read must not be given back before
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)


def _table(buckets: Iterable[Iterable[tuple[int, Piece]]], asked: Asked, where: torch.device) -> SliceTable:
    from checkpoint_engine.loads.slice_kernel import SliceTable

    numbers = {item: number for number, item in enumerate(asked.items)}

    def moves(pieces: Iterable[tuple[int, Piece]]) -> Iterator[Move]:
        for item, (raw, offset, strides, part) in pieces:
            address = raw.data_ptr() + offset
            yield Move(numbers[item], part.first, 0, address, part.run, part.sizes, part.strides, strides)

    return SliceTable(map(moves, buckets), where)


class SlicedCheck(Check):
    """Another check, but that of some tensors only slices are read, where they landed."""

    def __init__(self, whole: Check, sums: Sums, memories: Sequence[torch.Tensor], seconds: float) -> None:
        self._whole, self._sums, self._memories, self._patience = whole, sums, memories, seconds
        self.ahead = whole.ahead

    def begin(self, bucket: int, items: Sequence[int] | None) -> None:
        self._whole.begin(bucket, self._sums.unasked(bucket, items))

    def before_load(self, bucket: int) -> None:
        self._whole.before_load(bucket)
        self._sums.arrived(bucket, self._memories, self._patience)

    def loaded(self, bucket: int) -> None:
        self._sums.landed(bucket)

    def finish(self) -> None:
        self._whole.finish()
        self.sums = self._sums.finish(self._patience)
        self.seconds, self.nbytes = self._whole.seconds + self._sums.seconds, self._whole.nbytes + self._sums.nbytes

    def close(self) -> None:
        self._sums.close()
        self._whole.close()


def with_slices(
    whole: Check,
    attach: Attach,
    offered: Mapping[str, Taken],
    tables: Sequence[Table],
    memories: Sequence[torch.Tensor],
    replaying: Replaying | None,
    device: Device,
    seconds: float,
    at_work: AtWork | None = None,
) -> Check:
    """The check with what `attach` asks for. offered: what this worker said that it takes, by name. replaying: what this stream
    replays. Raises ProtocolError when that was not offered, or is of other tables; then `whole` is closed."""
    slicing = attach.slicing
    if not slicing.items:
        return whole
    try:
        name = slicing.names[0] if slicing.names else ""
        if name not in offered:
            raise ProtocolError(f"the server asks for slices {name!r} that this worker does not take")
        if replaying is not None and replaying.taken_name != name:
            replaying = None
        asked = _asked_for(attach, name, offered[name], tables)
        return SlicedCheck(whole, _sums(asked, replaying, memories, device, at_work), memories, seconds)
    except BaseException:
        whole.close()
        raise


def _sums(
    asked: Asked, replaying: Replaying | None, memories: Sequence[torch.Tensor], device: Device, at_work: AtWork | None
) -> Sums:
    if any(raw.is_cuda for raw in (memories if replaying is None else replaying.storages)):
        return DeviceSliceSums(asked, replaying, memories, device)
    return SliceSums(asked, replaying, at_work)


def _asked_for(attach: Attach, name: str, taken: Taken, tables: Sequence[Table]) -> Asked:
    return _asked.of((attach.plan, name, attach.slicing.items), lambda: Asked(attach.slicing, taken, tables))
