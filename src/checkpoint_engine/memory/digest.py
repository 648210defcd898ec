"""Digests of tensors while their bytes arrive in a region (what a digest is: memory.checksum).

They are made of parts: so the blocks of one tensor can be summed up in any order by any thread, or by a device when all are
there, and the result depends on the bytes alone.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import torch

from checkpoint_engine.memory.checksum import CHUNK_BYTES, digest, finish, run_sums
from checkpoint_engine.memory.region import HostRegion

BLOCK_BYTES = 1 << 20
"""A multiple of CHUNK_BYTES, so that a block's chunks are its tensor's."""

WORD_BYTES = 8
"""What a device sums up begins at a multiple of this: in files that are mapped in place a tensor may begin anywhere."""
DEVICE_BYTES = 256 << 20
"""Of a region that a device sums up; smaller ones are done by the time that it has begun."""


def content_digest(data: memoryview | bytes) -> int:
    """64 bits of `data`, a tensor's bytes; never 0, which means that no digest was made."""
    return digest(torch.frombuffer(bytearray(data), dtype=torch.uint8)) if len(data) else finish(0, 0)


class Block:
    """Bytes [offset, end) of a region and their sum. chunk: the number of its first chunk in its tensor. pending: pieces of work
    that still have to bring some of them."""

    __slots__ = ("chunk", "end", "offset", "pending", "sum")

    def __init__(self, offset: int, end: int, chunk: int) -> None:
        self.offset, self.end, self.chunk = offset, end, chunk
        self.sum, self.pending = 0, 0


class Span:
    """`nbytes` bytes of `region` from `offset` on, which hold one tensor."""

    __slots__ = ("blocks", "nbytes", "offset", "region")

    def __init__(self, region: HostRegion, offset: int, nbytes: int) -> None:
        self.region, self.offset, self.nbytes = region, offset, nbytes
        end = offset + nbytes
        self.blocks = [
            Block(start, min(start + BLOCK_BYTES, end), (start - offset) // CHUNK_BYTES)
            for start in range(offset, end, BLOCK_BYTES)
        ]

    @property
    def digest(self) -> int:
        """Of all its blocks, once they are made."""
        return finish(sum(block.sum for block in self.blocks), self.nbytes)


class RegionSums(Protocol):
    """Sums up what lies in a region that is registered with a device."""

    def prepare(self) -> bool:
        """It will be needed soon. Does not wait. False: it is known to be able to do nothing."""

    def __call__(self, memory: torch.Tensor, runs: Sequence[tuple[int, int]]) -> list[int] | None:
        """`checksum.partial_sum` of each of these runs (offset, a multiple of WORD_BYTES; bytes) of the region's memory. None: it
        cannot make them."""


class Digests:
    """Sums up each block in the thread that brings its last bytes, those of large regions by a device, if that can, in the end.

    For every region `begin`, `arrived` or `make` as its bytes come, and `end` when all are there.
    """

    def __init__(self, *, enabled: bool, by_device: RegionSums | None = None) -> None:
        self.enabled = enabled
        self._by_device = by_device
        self._later: set[HostRegion] = set()
        self._lock = threading.Lock()

    def begin(self, region: HostRegion) -> bool:
        """Whether a device is going to make those of its tensors."""
        large = self.enabled and region.nbytes >= DEVICE_BYTES
        if large and self._by_device is not None and self._by_device.prepare():
            self._later.add(region)
        return region in self._later

    def early(self, region: HostRegion) -> bool:
        """Whether those of its tensors are made as their bytes arrive."""
        return self.enabled and region not in self._later

    def end(self, region: HostRegion, spans: Sequence[Span]) -> list[Span]:
        """All bytes of these, all that are in the region, are there, and it is registered with the device. Returns those that are
        still to be made."""
        if region not in self._later:
            return []
        self._later.discard(region)
        held = [span for span in spans if span.blocks]
        mine = [span for span in held if span.offset % WORD_BYTES == 0]
        sums = self._by_device(region.tensor, [(span.offset, span.nbytes) for span in mine]) if self._by_device else None
        if sums is None:
            return held
        for span, total in zip(mine, sums, strict=True):
            span.blocks[0].sum = total  # of all of them
        return [span for span in held if span.offset % WORD_BYTES]

    def of(self, span: Span) -> int:
        """0 when they are switched off."""
        return span.digest if self.enabled else 0

    def arrived(self, region: HostRegion, blocks: Sequence[Block]) -> None:
        """One of the `pending` pieces of work of these blocks has brought its bytes."""
        if not self.early(region):
            return
        with self._lock:
            for block in blocks:
                block.pending -= 1
            whole = [block for block in blocks if block.pending == 0]
        self.make(region, whole)

    def make(self, region: HostRegion, blocks: Sequence[Block]) -> None:
        """Of blocks whose bytes are all there."""
        if self.early(region):
            raws = [region.tensor[block.offset : block.end] for block in blocks]
            for block, total in zip(blocks, run_sums(raws, [block.chunk for block in blocks]), strict=True):
                block.sum = total
