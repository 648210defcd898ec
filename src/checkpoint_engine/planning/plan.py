"""What a plan is. Every rank computes the same one from the same manifest and sizes; nothing here is ever negotiated."""

from __future__ import annotations

from functools import cached_property

import msgspec

from checkpoint_engine.manifest import hex_digest

ALIGNMENT = 256
"""Bytes. Every tensor starts at a multiple of this in the ring: enough for any dtype and for 16-byte vector loads."""


class Item(msgspec.Struct, frozen=True, array_like=True):
    """One whole tensor of a bucket, as the worker needs it.

    offset  bytes from the bucket's start; from the start of memory number `memory` where that is not the ring
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    memory: int = 0


class Copy(msgspec.Struct, frozen=True, array_like=True):
    """Bytes [source, source + nbytes) of the owner's region go to the bucket's bytes from `offset` on."""

    region: int
    source: int
    offset: int
    nbytes: int


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """The bytes [offset, offset + nbytes) of a bucket, which `owner` lifts and shares in one go."""

    owner: int
    offset: int
    nbytes: int
    copies: tuple[Copy, ...]


class Bucket(msgspec.Struct, frozen=True, array_like=True):
    """A run of whole tensors that is loaded together.

    offset  where it starts in the shared memory, bytes
    after   index of the last bucket that must have been loaded everywhere before these bytes may be overwritten; -1: none
    pieces  cover it in order, except for alignment gaps
    """

    offset: int
    nbytes: int
    after: int
    items: tuple[Item, ...]
    pieces: tuple[Piece, ...]


class Plan(msgspec.Struct, frozen=True, dict=True):
    """The stream of one pass.

    ring_bytes    size of the memory that server and worker share: the ring and an area for large buckets behind it
    bucket_bytes  a larger bucket is a large one, and lies in the area; all others lie in the ring
    piece_bytes   no piece is larger: the size of a staging slot
    order         "layers" or "owners": see planning.buckets
    buckets       in the order in which they are complete, and are loaded
    stream        every piece once, as (bucket, number within its bucket), in the order in which pieces are shared. Pieces of
                  one bucket come in order, but other owners' may come between them. When the first piece of a bucket is
                  due, all buckets up to its `after` are complete. A plan that has a bucket without pieces
                  has no other, and an empty stream.
    """

    ring_bytes: int
    bucket_bytes: int
    piece_bytes: int
    order: str
    buckets: tuple[Bucket, ...]
    stream: tuple[tuple[int, int], ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of tensors that a worker receives."""
        return sum(self.sizes)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each bucket's tensors."""
        return tuple(sum(i.nbytes for i in b.items) for b in self.buckets)

    @cached_property
    def item_names(self) -> tuple[str, ...]:
        """Of each tensor, in the order of the buckets."""
        return tuple(item.name for bucket in self.buckets for item in bucket.items)

    @cached_property
    def item_sizes(self) -> tuple[int, ...]:
        """Bytes of each tensor, in the order of the buckets."""
        return tuple(item.nbytes for bucket in self.buckets for item in bucket.items)

    @cached_property
    def digest(self) -> str:
        """32 hex digits; a worker that has seen it needs no second copy of the table."""
        return hex_digest(msgspec.msgpack.encode(self))
