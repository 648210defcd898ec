"""Digests of tensors while their bytes arrive in a region (what a digest is: memory.checksum).

They are made of parts: so the blocks of one tensor can be summed up in any order by any thread, each while its bytes are still
in that core's cache, and the result depends on the bytes alone.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from checkpoint_engine.memory.checksum import CHUNK_BYTES, digest, finish, partial_sum
from checkpoint_engine.memory.region import HostRegion

BLOCK_BYTES = 1 << 20
"""A multiple of CHUNK_BYTES, so that a block's chunks are its tensor's."""


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


class Digests:
    """Sums up each block in the thread that brings its last bytes."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self._lock = threading.Lock()

    def of(self, span: Span) -> int:
        """0 when they are switched off."""
        return span.digest if self.enabled else 0

    def arrived(self, region: HostRegion, blocks: Sequence[Block]) -> None:
        """One of the `pending` pieces of work of these blocks has brought its bytes."""
        if not self.enabled:
            return
        with self._lock:
            for block in blocks:
                block.pending -= 1
            whole = [block for block in blocks if block.pending == 0]
        self.make(region, whole)

    def make(self, region: HostRegion, blocks: Sequence[Block]) -> None:
        """Of blocks whose bytes are all there."""
        if self.enabled:
            for block in blocks:
                block.sum = int(partial_sum(region.tensor[block.offset : block.end], block.chunk))
