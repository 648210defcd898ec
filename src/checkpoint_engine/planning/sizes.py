"""How large buckets, ring and pieces are when nobody says."""

from __future__ import annotations

import dataclasses

from checkpoint_engine.errors import ManifestError
from checkpoint_engine.planning.plan import ALIGNMENT
from checkpoint_engine.settings import KIB, MIB

CUDA_BUCKET = 128 * MIB
"""A tensor up to this size travels in the ring on cuda, where the next ones overlap with it: the matrices of an 8 B model."""
_SMALLEST = 4 * KIB


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes, as `plan_broadcast` takes them. ring_bytes: without what large tensors need behind the ring."""

    bucket_bytes: int
    ring_bytes: int
    piece_bytes: int


def preferred_piece(device: str, world_size: int) -> int:
    """Bytes of a piece where memory does not matter; the reasons are at `default_sizes`."""
    return min(max(64, world_size), 256) * MIB if device == "cuda" else 16 * MIB


def preferred_bucket(device: str, world_size: int) -> int:
    """Bytes of the largest bucket in the ring where memory does not matter; the reasons are at `default_sizes`."""
    piece = preferred_piece(device, world_size)
    return max(CUDA_BUCKET, piece) if device == "cuda" else piece


def default_sizes(
    device: str,
    world_size: int,
    free_bytes: int,
    mem_fraction: float,
    bucket_bytes: int | None = None,
    ring_bytes: int | None = None,
) -> Sizes:
    """Sizes for `device` ("cuda", "cpu") when the least free memory of any rank is `free_bytes`.

    Given sizes are taken as they are where they fit. The rest defaults to:

    cuda  pieces of 64 MiB (on 2 x H200 larger ones gained nothing and 32 MiB lost 10 %), growing with the ranks to
          256 MiB. A broadcast reaches the last rank world_size hops late; a hop of 3 us at 300 GB/s costs the time of
          1 MiB; so W ranks get pieces of W MiB, to lose no more than half, and from 256 ranks on memory is worth more
          than the rest. Buckets of CUDA_BUCKET at
          most, filled up to a piece, and a ring of 3: 384 MiB, six full buckets. On up to 8 ranks, which may be a host's and
          then lift straight into the ring, two pieces of each: 1 GiB for 8, predicted twice as fast as 384 MiB.
    cpu   pieces and buckets of 16 MiB, to stay in or near the caches, and a ring of 4, as threads wake up late.

    A piece is never larger than a bucket. The ring, and on cuda with several ranks 2 more pieces of staging, take at most
    `free_bytes * mem_fraction`: first buckets that nobody asked for shrink to a piece, then the ring to 2 buckets and 1
    (it overlaps less, but moves the same pieces), then buckets and pieces shrink together.

    Raises ManifestError when not even the smallest buckets fit.
    """
    slots = 3 if device == "cuda" else 4
    staging = 2 if device == "cuda" and world_size > 1 else 0
    bucket = bucket_bytes or preferred_bucket(device, world_size)
    if ring_bytes is not None:
        bucket = min(bucket, ring_bytes if bucket_bytes else max(ring_bytes // slots, _SMALLEST))
    bucket = _floor(bucket)
    piece = _floor(min(bucket, preferred_piece(device, world_size)))

    budget = int(free_bytes * mem_fraction)
    room = budget - staging * piece
    if bucket_bytes is None and ring_bytes is None and slots * bucket > room:
        bucket = max(piece, _floor(room // slots))
    ring = _floor(ring_bytes or max(slots * bucket, 0 if bucket_bytes else _for_owners(device, world_size, piece)))
    if ring > room >= bucket:
        ring = _floor(room) if ring_bytes else room // bucket * bucket
    elif ring > room:
        ring = bucket = _floor(max(room, budget // (staging + 1)))
        piece = min(piece, bucket)
    if bucket < _SMALLEST:
        raise ManifestError(
            f"{budget} bytes, {mem_fraction:g} of the {free_bytes} that are free on the fullest {device} device, "
            f"are too few for a ring and its staging"
        )
    return Sizes(bucket, ring, piece)


def _for_owners(device: str, world_size: int, piece: int) -> int:
    """A ring in which all ranks of a host can lift while as much is being shared and loaded."""
    return 2 * world_size * piece if device == "cuda" and world_size <= 8 else 0


def _floor(nbytes: int) -> int:
    return nbytes - nbytes % ALIGNMENT
