"""The digests of a plan's tensors, in the order in which its workers see them. Not part of the plan, which outlives contents."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from checkpoint_engine.manifest import Manifest
from checkpoint_engine.planning.plan import Bucket, Item, Plan


def packed_digests(plan: Plan, manifest: Manifest) -> bytes:
    """8 bytes for each item of each of the plan's buckets, little-endian; 0 for one without a digest. Nothing at all when none
    has one.

    Holders of a tensor agree on its digest, or gather_metas would have raised (planning.holders); where only some made one,
    it is theirs.
    """
    known = {t.name: t.digest for rank in manifest.ranks for region in rank.regions for t in region.tensors if t.digest}
    if not known:
        return b""
    return pack([known.get(name, 0) for name in plan.item_names])


def unpack(packed: bytes) -> array[int]:
    """The digests of `pack`."""
    digests = array("Q", packed)
    if _BIG_ENDIAN:
        digests.byteswap()
    return digests


def pack(digests: Sequence[int]) -> bytes:
    """See `packed_digests`."""
    packed = array("Q", digests)
    if _BIG_ENDIAN:
        packed.byteswap()
    return packed.tobytes()


def in_order(numbers: bytes) -> bytes:
    """64-bit numbers as they lie in memory, as they travel; and the other way round."""
    return pack(array("Q", numbers)) if _BIG_ENDIAN else numbers


_BIG_ENDIAN = array("H", [1]).tobytes() != b"\1\0"


def source_of(name: str, buckets: Iterable[Bucket]) -> tuple[int, ...]:
    """The ranks whose memory a tensor of the plan comes from, in the order of its bytes; for messages. Empty when it has none, or
    there is no such tensor."""
    return next((_owners(item, bucket) for bucket in buckets for item in bucket.items if item.name == name), ())


def _owners(item: Item, bucket: Bucket) -> tuple[int, ...]:
    end = item.offset + item.nbytes
    found = [piece.owner for piece in bucket.pieces if piece.offset < end and item.offset < piece.offset + piece.nbytes]
    return tuple(dict.fromkeys(found))
