"""Which ranks take part in which bucket of a stream whose workers need only some: the same answer on every rank.

A set of ranks is an int here, bit r for rank r; what a rank needs are bytes, a bit for each bucket (planning.bits).
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec

from checkpoint_engine.planning.bits import unpack_bits
from checkpoint_engine.planning.plan import Plan

MAX_GROUPS = 8
"""Sub-groups that one rank may be in: each has a communicator of its own, which takes device memory on all of its ranks."""
WORTH = 0.002
"""A sub-group must save this part of what is sent without any."""
CANDIDATES = 128


def _members(value: int) -> Iterator[int]:
    while value:
        low = value & -value
        yield low.bit_length() - 1
        value ^= low


class Shares(msgspec.Struct, frozen=True, dict=True):
    """buckets: the set of ranks that take part in each; 0: none does. groups: those of them that are neither all ranks nor one
    alone, in an order that is the same on all ranks. unsent: bytes that ranks are not sent, of all ranks together."""

    world_size: int
    buckets: tuple[int, ...]
    groups: tuple[int, ...]
    unsent: int

    def ranks(self, bucket: int) -> tuple[int, ...] | None:
        """None: all."""
        mask = self.buckets[bucket]
        return None if mask == (1 << self.world_size) - 1 else tuple(_members(mask))

    def takes_part(self, rank: int, bucket: int) -> bool:
        return bool(self.buckets[bucket] >> rank & 1)

    def members(self, group: int) -> tuple[int, ...]:
        return tuple(_members(group))


def plan_shares(plan: Plan, needs: Sequence[bytes], hosts: Sequence[str], limit: int | None) -> Shares | None:
    """In a bucket take part the ranks that need it, and the owners of its pieces where any does. None: all ranks in all buckets.

    needs   of each rank, one bit for each bucket of `plan`; empty: it needs all
    hosts   of each rank: sub-groups of whole hosts are considered, too
    limit   no rank may be in more sub-groups; they are chosen by the bytes that they save, and other buckets go to the smallest
            that has all their ranks, or to all. None: any number, for who needs no communicator

    Raises ValueError when the needs of a rank are not of this plan; the message begins with its number.
    """
    if not any(needs):
        return None
    exact = _exact(plan, needs)
    everybody = (1 << len(needs)) - 1
    if limit is None:
        chosen = exact
    else:
        totals: Counter[int] = Counter()
        for mask, bucket in zip(exact, plan.buckets, strict=True):
            if mask.bit_count() > 1 and mask != everybody:
                totals[mask] += bucket.nbytes
        wider = _choose(totals, _host_masks(hosts), everybody, limit, WORTH * plan.nbytes * (len(needs) - 1))
        chosen = [wider.get(mask, mask) for mask in exact]
    unsent = sum((everybody & ~mask).bit_count() * b.nbytes for mask, b in zip(chosen, plan.buckets, strict=True))
    if not unsent:
        return None
    used = sorted({mask for mask in chosen if mask.bit_count() > 1 and mask != everybody})
    return Shares(len(needs), tuple(chosen), tuple(used) if limit is not None else (), unsent)


def _exact(plan: Plan, needs: Sequence[bytes]) -> list[int]:
    """For each bucket who must take part."""
    always = sum(1 << rank for rank, bits in enumerate(needs) if not bits)
    masks = [always] * len(plan.buckets)
    for rank, bits in enumerate(needs):
        if bits:
            try:
                needed = unpack_bits(bits, len(plan.buckets))
            except ValueError as e:
                raise ValueError(f"{rank}: {e}") from None
            for bucket in needed:
                masks[bucket] |= 1 << rank
    for index, mask in enumerate(masks):
        if mask:
            for owner in {piece.owner for piece in plan.buckets[index].pieces}:
                masks[index] |= 1 << owner
    return masks


def _host_masks(hosts: Sequence[str]) -> list[int]:
    masks: Counter[str] = Counter()
    for rank, host in enumerate(hosts):
        masks[host] += 1 << rank
    return [masks[host] for host in hosts]


def _choose(totals: Counter[int], hosts: Sequence[int], everybody: int, limit: int, worth: float) -> dict[int, int]:
    """For each set of `totals` (with the bytes of its buckets) the one that its buckets go to. Sub-groups are taken greedily,
    each time the one that saves most beside those that there are. hosts: of each rank all ranks there."""
    saves: Counter[int] = Counter()
    for mask, nbytes in totals.items():
        for candidate in {mask, functools.reduce(operator.or_, (hosts[rank] for rank in _members(mask)))}:
            saves[candidate] += nbytes * (everybody & ~candidate).bit_count()
    candidates = sorted((c for c in saves if c != everybody), key=lambda c: (-saves[c], c))[:CANDIDATES]
    of_rank = {rank: [c for c in candidates if c >> rank & 1] for rank in range(len(hosts))}
    inside: dict[int, list[int]] = {c: [] for c in candidates}
    for mask in totals:
        for candidate in of_rank[next(_members(mask))]:
            if not mask & ~candidate:
                inside[candidate].append(mask)
    chosen = dict.fromkeys(totals, everybody)
    memberships: Counter[int] = Counter()
    while candidates := [c for c in candidates if all(memberships[rank] < limit for rank in _members(c))]:
        gains = {
            c: sum(totals[mask] * max(0, chosen[mask].bit_count() - c.bit_count()) for mask in inside[c]) for c in candidates
        }
        best = min(candidates, key=lambda c: (-gains[c], c))
        if gains[best] <= worth:
            break
        candidates.remove(best)
        memberships.update(_members(best))
        chosen.update({mask: best for mask in inside[best] if best.bit_count() < chosen[mask].bit_count()})
    return chosen
