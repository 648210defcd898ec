"""What a worker takes of each tensor, and the sums of that: of the bytes as they landed in the model.

A worker that cannot replay, though it said that it would, checks whole tensors and makes the sums that it is asked for of the
servers' memory: so the others' slices can be checked all the same.
"""

from __future__ import annotations

import collections
import itertools
import math
import os
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import NamedTuple, Protocol

import torch

from checkpoint_engine.devices.base import Closing
from checkpoint_engine.devices.busy import Busy
from checkpoint_engine.devices.host_digests import BLOCK_BYTES, THREADS, AtWork
from checkpoint_engine.errors import DeadlineError, ProtocolError
from checkpoint_engine.loads.plan import LoadPlan
from checkpoint_engine.memory.checksum import CHUNK_BYTES
from checkpoint_engine.memory.slices import slice_sum
from checkpoint_engine.planning.bits import unpack_bits
from checkpoint_engine.planning.digests import pack
from checkpoint_engine.planning.slices import MAX_DIMS, MAX_SLICES, Slice, Taken
from checkpoint_engine.transport.messages import Slicing, Table

SMALL_BYTES = 1 << 16
"""Tensors below this are checked whole by threads: a sum of their slices takes as long."""


class Piece(NamedTuple):
    """A slice that lies in `raw` (uint8, one-dimensional) from `offset` on, its runs `strides` bytes apart."""

    raw: torch.Tensor
    offset: int
    strides: tuple[int, ...]
    part: Slice


class Replaying(Protocol):
    """A plan that is replayed on these storages, and the name of what it takes."""

    @property
    def plan(self) -> LoadPlan: ...
    @property
    def taken_name(self) -> str: ...
    @property
    def storages(self) -> Sequence[torch.Tensor]: ...


def taken_of(plan: LoadPlan, tables: Sequence[Table], small: int | None = None) -> Taken:
    """What a replay takes of the tables' tensors, in their order, as Taken.decode accepts it. Not told: of tensors below `small`
    bytes (None: SMALL_BYTES), those that are cut in too many slices, or go into staged layers."""
    planned, small = plan.by_name, SMALL_BYTES if small is None else small
    items = (item for table in tables for item in table.items)
    return Taken(tuple(_part(plan, i.name, i.nbytes, small) if i.name in planned else None for i in items))


def _part(plan: LoadPlan, name: str, nbytes: int, small: int) -> tuple[Slice, ...] | None:
    copies = plan.by_name[name].copies
    if nbytes < small or len(copies) > MAX_SLICES or any(len(copy.sizes) > MAX_DIMS for copy in copies):
        return None
    if any(plan.storages[copy.storage].slot is not None for copy in copies):
        return None  # gone, or post-processed, by the time that a thread would sum it up
    return tuple(Slice(c.source, c.run, c.sizes, c.source_strides) for c in copies)


class Asked:
    """Which tensors `slicing` asks for sums of slices of.

    by_bucket  numbers of tensors within each bucket
    firsts     number of each bucket's first tensor
    items      all of them, numbered as `taken` does, in order
    """

    def __init__(self, slicing: Slicing, taken: Taken, tables: Sequence[Table]) -> None:
        """Raises ProtocolError when `slicing` is of other tables."""
        count = sum(len(table.items) for table in tables)
        other = ProtocolError(f"the server asks for slices of {8 * len(slicing.items)} tensors, not of {count}")
        if len(taken.parts) != count:
            raise other
        try:
            asked = frozenset(unpack_bits(slicing.items, count))
        except ValueError:
            raise other from None
        self._taken, self._tables = taken, tables
        sizes = [len(table.items) for table in tables]
        self.firsts = [0, *itertools.accumulate(sizes)][:-1]
        self.by_bucket = [[n for n in range(size) if first + n in asked] for first, size in zip(self.firsts, sizes, strict=True)]
        self.items = sorted(asked)

    def whole(self, bucket: int, items: Sequence[int] | None, *, replaying: bool) -> list[int] | None:
        """Those of a bucket's tensors that are to be checked whole, of `items`; None: all."""
        if not replaying:
            return None if items is None else list(items)
        asked = set(self.by_bucket[bucket])
        return [n for n in (range(len(self._tables[bucket].items)) if items is None else items) if n not in asked]

    def there(self, bucket: int, memories: Sequence[torch.Tensor]) -> Iterator[tuple[int, Piece]]:
        """The slices of a bucket, each with its tensor's number, where the servers have them. Raises ProtocolError for one that
        leaves its tensor."""
        table = self._tables[bucket]
        for n in self.by_bucket[bucket]:
            item = table.items[n]
            start = table.offset + item.offset
            for part in self._taken.parts[self.firsts[bucket] + n] or ():
                if not part.inside(item.nbytes):
                    raise ProtocolError(f"the server asks for a slice outside of {item.name!r}")
                yield self.firsts[bucket] + n, Piece(memories[item.memory], start + part.first, part.strides, part)

    def here(self, bucket: int, replaying: Replaying) -> Iterator[tuple[int, Piece]]:
        """The same where they landed."""
        for n in self.by_bucket[bucket]:
            item = self.firsts[bucket] + n
            copies = replaying.plan.by_name[self._tables[bucket].items[n].name].copies
            for part, copy in zip(self._taken.parts[item] or (), copies, strict=True):
                yield item, Piece(replaying.storages[copy.storage], copy.target, copy.target_strides, part)


class Sums(Closing):
    """Makes the sums that are asked for. replaying: None: of the servers' memory. seconds, nbytes: as in Check."""

    seconds = 0.0
    nbytes = 0

    def __init__(self, asked: Asked, replaying: Replaying | None) -> None:
        self._asked, self._replaying = asked, replaying

    def unasked(self, bucket: int, items: Sequence[int] | None) -> list[int] | None:
        """As Asked.whole."""
        return self._asked.whole(bucket, items, replaying=self._replaying is not None)

    @abstractmethod
    def arrived(self, bucket: int, memories: Sequence[torch.Tensor], seconds: float) -> None:
        """The bucket lies in the servers' memory. Returns when what is needed of it was read, or that is queued on the stream
        that the loader uses. Raises as `finish`."""

    @abstractmethod
    def landed(self, bucket: int) -> None:
        """A replay of the bucket is over, or queued. Never waits."""

    @abstractmethod
    def finish(self, seconds: float) -> bytes:
        """All of them, packed. Raises DeadlineError when they are not made in `seconds`."""


class SliceSums(Sums):
    """Made in threads."""

    def __init__(self, asked: Asked, replaying: Replaying | None, at_work: AtWork | None = None) -> None:
        super().__init__(asked, replaying)
        self._at_work = at_work
        self._totals = dict.fromkeys(asked.items, 0)
        self._pool = ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0))), thread_name_prefix="slices")
        self._begun: collections.deque[Future[list[tuple[int, int]]]] = collections.deque()
        self._busy = Busy()

    def arrived(self, bucket: int, memories: Sequence[torch.Tensor], seconds: float) -> None:
        if self._replaying is None:
            self._begin(bucket, self._asked.there(bucket, memories))
            self._collect(seconds)

    def landed(self, bucket: int) -> None:
        if self._replaying is not None:
            self._begin(bucket, self._asked.here(bucket, self._replaying))

    def _begin(self, bucket: int, pieces: Iterator[tuple[int, Piece]]) -> None:
        for unit in _units(pieces):
            self.nbytes += sum(piece.part.nbytes for _, piece in unit)
            self._begun.append(self._pool.submit(self._sum, bucket, unit))

    def _sum(self, bucket: int, unit: list[tuple[int, Piece]]) -> list[tuple[int, int]]:
        start = time.perf_counter()
        with self._busy:
            found = [(item, slice_sum(*piece)) for item, piece in unit]
        if self._at_work is not None:
            self._at_work(bucket, start, time.perf_counter(), sum(piece.part.nbytes for _, piece in unit))
        return found

    def finish(self, seconds: float) -> bytes:
        self._collect(seconds)
        self.seconds = self._busy.seconds
        return pack([total & (1 << 64) - 1 for _, total in sorted(self._totals.items())])

    def _collect(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._begun:
            try:
                for item, found in self._begun.popleft().result(max(0.0, deadline - time.monotonic())):
                    self._totals[item] += found
            except NotYet:
                raise DeadlineError("the sums of slices to be made", seconds) from None

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _units(pieces: Iterator[tuple[int, Piece]]) -> Iterator[list[tuple[int, Piece]]]:
    """What a thread takes at a time."""
    unit: list[tuple[int, Piece]] = []
    size = 0
    for item, whole in pieces:
        for piece in _cut(whole):
            unit.append((item, piece))
            size += piece.part.nbytes
            if size >= BLOCK_BYTES:
                yield unit
                unit, size = [], 0
    if unit:
        yield unit


def _cut(piece: Piece) -> Iterator[Piece]:
    """Into pieces of BLOCK_BYTES or so."""
    part = piece.part
    if part.nbytes < 2 * BLOCK_BYTES:
        yield piece
        return
    if math.prod(part.sizes) == 1:
        at = 0
        while at < part.run:
            step = min(part.run - at, BLOCK_BYTES - (part.first + at) % CHUNK_BYTES)  # the next one begins a chunk
            yield Piece(piece.raw, piece.offset + at, (), Slice(part.first + at, step))
            at += step
        return
    d = max(range(len(part.sizes)), key=lambda d: part.sizes[d])
    half = part.sizes[d] // 2
    for first, count in ((0, half), (half, part.sizes[d] - half)):
        sizes = (*part.sizes[:d], count, *part.sizes[d + 1 :])
        cut = Slice(part.first + first * part.strides[d], part.run, sizes, part.strides)
        yield from _cut(piece._replace(offset=piece.offset + first * piece.strides[d], part=cut))
