"""The digest of a tensor's bytes, in one place so that it can be replaced as a whole.

It is made of the digests of blocks, counted from the tensor's start. So the blocks of one tensor can be made in any order
by any thread, each while its bytes are still in that core's cache, and the result depends on the bytes alone.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import xxhash

from checkpoint_engine.memory.region import HostRegion

BLOCK_BYTES = 1 << 20


def content_digest(data: memoryview | bytes) -> int:
    """64 bits of `data`, a tensor's bytes; never 0, which means that no digest was made."""
    return combine([block_digest(data[start : start + BLOCK_BYTES]) for start in range(0, len(data), BLOCK_BYTES)])


def block_digest(data: memoryview | bytes) -> int:
    """64 bits of one block. Lets other threads run meanwhile."""
    return xxhash.xxh3_64_intdigest(data)


def combine(blocks: Sequence[int]) -> int:
    """The digest of a tensor, from those of its blocks in order."""
    if len(blocks) == 1:
        return blocks[0] or 1
    return xxhash.xxh3_64_intdigest(b"".join(block.to_bytes(8, "little") for block in blocks)) or 1


class Block:
    """Bytes [offset, end) of a region and their digest. pending: pieces of work that still have to bring some of them."""

    __slots__ = ("digest", "end", "offset", "pending")

    def __init__(self, offset: int, end: int) -> None:
        self.offset, self.end = offset, end
        self.digest, self.pending = 0, 0


class Span:
    """`nbytes` bytes of `region` from `offset` on, which hold one tensor."""

    __slots__ = ("blocks", "nbytes", "offset", "region")

    def __init__(self, region: HostRegion, offset: int, nbytes: int) -> None:
        self.region, self.offset, self.nbytes = region, offset, nbytes
        end = offset + nbytes
        self.blocks = [Block(start, min(start + BLOCK_BYTES, end)) for start in range(offset, end, BLOCK_BYTES)]

    @property
    def digest(self) -> int:
        """Of all its blocks, once they are made."""
        return combine([block.digest for block in self.blocks])


class Digests:
    """Makes each block's digest in the thread that brings its last bytes."""

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
                block.digest = block_digest(region.view(block.offset, block.end - block.offset))
