"""Where each tensor of a plan lies in the owners' regions, for workers that read it there instead of from the ring."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from checkpoint_engine.manifest import Manifest
from checkpoint_engine.planning.plan import Bucket, Item, Plan


def region_numbers(manifest: Manifest) -> dict[tuple[int, int], int]:
    """(rank, number of its region) -> number among all regions, in rank order."""
    keys = [(r.rank, number) for r in manifest.ranks for number in range(len(r.regions))]
    return {key: number for number, key in enumerate(keys)}


def mapped_items(plan: Plan, manifest: Manifest) -> tuple[tuple[Item, ...], ...]:
    """The items of each bucket with `memory` the number of the region (see region_numbers) and `offset` from its start."""
    numbers = region_numbers(manifest)
    return tuple(_locate(bucket, numbers) for bucket in plan.buckets)


class Grouped(NamedTuple):
    """plan: of the same tensors in the same order as another one's, each of the `groups` of its buckets in one, of which nothing
    is lifted or shared."""

    plan: Plan
    groups: tuple[range, ...]


def grouped(plan: Plan, nbytes: int) -> Grouped:
    """The plan's buckets in runs of at most `nbytes` or of one bucket."""
    groups: list[range] = []
    held = 0
    for number, size in enumerate(plan.sizes):
        if groups and held + size <= nbytes:
            groups[-1], held = range(groups[-1].start, number + 1), held + size
        else:
            groups.append(range(number, number + 1))
            held = size
    buckets = tuple(
        Bucket(0, sum(plan.buckets[n].nbytes for n in group), -1, tuple(i for n in group for i in plan.buckets[n].items), ())
        for group in groups
    )
    return Grouped(msgspec.structs.replace(plan, buckets=buckets, stream=()), tuple(groups))


def _locate(bucket: Bucket, numbers: dict[tuple[int, int], int]) -> tuple[Item, ...]:
    # Copies in order of offset; a tensor's bytes are contiguous in its region, so where its first byte lies says it all.
    copies = [(copy, piece.owner) for piece in bucket.pieces for copy in piece.copies]
    located = []
    at = 0
    for item in sorted((i for i in bucket.items if i.nbytes), key=lambda i: i.offset):
        while item.offset >= copies[at][0].offset + copies[at][0].nbytes:
            at += 1
        copy, owner = copies[at]
        offset = copy.source + item.offset - copy.offset
        located.append(msgspec.structs.replace(item, memory=numbers[owner, copy.region], offset=offset))
    place = {item.name: item for item in located}
    return tuple(place.get(item.name, item) for item in bucket.items)
