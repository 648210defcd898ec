"""From a manifest with several holders of the same bytes to who reads what from whom, for receivers that do not have it.

A receiver group is the ranks that share what they read among themselves: one replica, usually. Each byte crosses the network
once for each group.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from checkpoint_engine.errors import CheckpointNotFoundError, ManifestError, SettingsError
from checkpoint_engine.manifest import Manifest, RankManifest, RegionMeta, TensorMeta
from checkpoint_engine.planning.holders import Held, all_holders
from checkpoint_engine.planning.order import layer_key


class Receiver(NamedTuple):
    """A rank that reads, and its host's name as in manifests. It may be in the manifest, too: what it holds it does not read."""

    rank: int
    host: str


class Assigned(NamedTuple):
    """Rank `receiver` reads the tensor `held` from rank `held.owner` through number `nic` of that rank's NICs. When they are
    the same rank nothing crosses a network, and `nic` is -1; likewise on one host."""

    receiver: int
    held: Held
    nic: int


class FetchPlan(msgspec.Struct, frozen=True):
    """What each group reads: every tensor once, in the order in which they travel."""

    groups: tuple[tuple[Assigned, ...], ...]

    def bytes_by_nic(self) -> collections.Counter[tuple[int, int]]:
        """(rank of the source, number of its NIC) -> bytes read through it, over all groups."""
        counted: collections.Counter[tuple[int, int]] = collections.Counter()
        for read in self.reads():
            if read.nic >= 0:
                counted[read.held.owner, read.nic] += read.held.nbytes
        return counted

    def bytes_by_receiver(self) -> collections.Counter[int]:
        """Rank -> bytes that it reads from other ranks."""
        counted: collections.Counter[int] = collections.Counter()
        for read in self.reads():
            if read.held.owner != read.receiver:
                counted[read.receiver] += read.held.nbytes
        return counted

    def reads(self) -> Iterable[Assigned]:
        return (read for group in self.groups for read in group)


def plan_fetch(
    manifest: Manifest,
    groups: Sequence[Sequence[Receiver]],
    nics: Mapping[int, int] | None = None,
    lost: Collection[int] = (),
) -> FetchPlan:
    """Which rank of each group reads which tensor, from which source and through which of the source's NICs.

    nics: how many each source rank has; 1 where it is not said. lost: ranks that are not read from any more.

    A tensor that a group's member holds is taken from there; else one that a member's host holds is read by that member;
    else it comes from the source, through the NIC, and to the member with the fewest bytes so far, for their number of NICs.
    Pure: equal on all ranks for equal arguments.

    Raises ManifestError when ranks disagree on a tensor, or when only lost ranks hold it (naming it and them),
    CheckpointNotFoundError when no rank holds any, SettingsError for a group without members or two with one rank.
    """
    ranks = [receiver.rank for group in groups for receiver in group]
    if len(set(ranks)) < len(ranks) or not all(groups):
        raise SettingsError("receiver groups must not be empty, and no rank can be in two")
    planner = _Planner(manifest, nics or {}, lost)
    return FetchPlan(tuple(planner.read_all(group) for group in groups))


def replace_sources(
    plan: FetchPlan,
    manifest: Manifest,
    groups: Sequence[Sequence[Receiver]],
    lost: Collection[int],
    done: Sequence[Collection[str]] = (),
    nics: Mapping[int, int] | None = None,
) -> FetchPlan:
    """`plan`, in which what was to be read from `lost` ranks comes from others; all else stays where it was.

    done: for each group, names of tensors that it has read: they stay, whoever they came from. manifest, groups, nics: as
    for `plan`. Raises ManifestError naming a tensor that nobody else holds.
    """
    planner = _Planner(manifest, nics or {}, lost)
    had = [frozenset(names) for names in done] or [frozenset[str]()] * len(plan.groups)
    for names, group in zip(had, plan.groups, strict=True):
        for read in group:
            if read.held.owner not in planner.lost and read.held.tensor.name not in names:
                planner.count(read)  # still to come

    def renew(read: Assigned, members: Sequence[Receiver], names: frozenset[str]) -> Assigned:
        name = read.held.tensor.name
        return planner.read(name, members) if read.held.owner in planner.lost and name not in names else read

    return FetchPlan(
        tuple(
            tuple(renew(read, members, names) for read in group)
            for group, members, names in zip(plan.groups, groups, had, strict=True)
        )
    )


def as_manifest(reads: Sequence[Assigned], manifest: Manifest) -> tuple[Manifest, tuple[tuple[int, int], ...]]:
    """One group's reads as a manifest in which each receiver "holds" what it reads, so that a pass within the group can be
    planned as a broadcast; and, for each region number in it, which (source rank, region of the source) it stands for.

    Every receiver's regions are all of the sources' regions, in that order; regions it reads nothing from are empty.
    """
    lengths = {(r.rank, n): region.nbytes for r in manifest.ranks for n, region in enumerate(r.regions)}
    sources = tuple(sorted({(read.held.owner, read.held.region) for read in reads}))
    tensors: dict[tuple[int, tuple[int, int]], list[TensorMeta]] = collections.defaultdict(list)
    for read in reads:
        tensors[read.receiver, (read.held.owner, read.held.region)].append(read.held.tensor)

    def region(receiver: int, source: tuple[int, int]) -> RegionMeta:
        # What begins where empty tensors lie comes behind them: whoever looks an offset up finds it.
        held = sorted(tensors.get((receiver, source), ()), key=lambda t: (t.offset, t.nbytes))
        return RegionMeta(lengths[source], tuple(held))

    receivers = sorted({read.receiver for read in reads})
    ranks = tuple(RankManifest(rank, "", "", tuple(region(rank, s) for s in sources)) for rank in receivers)
    return Manifest(manifest.checkpoint, ranks), sources


class _Planner:
    """Counts bytes while it hands out reads."""

    def __init__(self, manifest: Manifest, nics: Mapping[int, int], lost: Collection[int]) -> None:
        self._holders = all_holders(manifest)
        if not self._holders:
            raise CheckpointNotFoundError(manifest.checkpoint, "on any rank")
        self._hosts = {rank.rank: rank.host for rank in manifest.ranks}
        self._nics = {rank: max(1, nics.get(rank, 1)) for rank in self._hosts}
        self._sent: collections.Counter[tuple[int, int]] = collections.Counter()  # through (source, NIC)
        self._local: collections.Counter[int] = collections.Counter()  # by source, on one host
        self._received: collections.Counter[int] = collections.Counter()
        self.lost = frozenset(lost)

    def read_all(self, group: Sequence[Receiver]) -> tuple[Assigned, ...]:
        # What few hold is settled first, and the rest evens it out.
        scarce = sorted(sorted(self._holders, key=layer_key), key=lambda name: len(self._holders[name]))
        reads = {name: self.read(name, group) for name in scarce}
        return tuple(reads[name] for name in sorted(reads, key=layer_key))

    def read(self, name: str, group: Sequence[Receiver]) -> Assigned:
        held = [h for h in self._holders[name] if h.owner not in self.lost]
        if not held:
            gone = sorted(h.owner for h in self._holders[name])
            raise ManifestError(f"tensor {name!r} cannot be read any more: only ranks {gone} held it, and they are lost")
        read = self._own(held, group) or self._on_host(held, group) or self._far(held, group)
        self.count(read)
        return read

    def count(self, read: Assigned) -> None:
        owner, nbytes = read.held.owner, read.held.nbytes
        if owner == read.receiver:
            return
        self._received[read.receiver] += nbytes
        if read.nic >= 0:
            self._sent[owner, read.nic] += nbytes
        else:
            self._local[owner] += nbytes

    def _own(self, held: Sequence[Held], group: Sequence[Receiver]) -> Assigned | None:
        members = {receiver.rank for receiver in group}
        return next((Assigned(h.owner, h, -1) for h in held if h.owner in members), None)

    def _on_host(self, held: Sequence[Held], group: Sequence[Receiver]) -> Assigned | None:
        pairs = [(h, r) for h in held for r in group if self._hosts[h.owner] == r.host]
        if not pairs:
            return None
        best, to = min(pairs, key=lambda p: (self._received[p[1].rank], self._local[p[0].owner], p[0].owner, p[1].rank))
        return Assigned(to.rank, best, -1)

    def _far(self, held: Sequence[Held], group: Sequence[Receiver]) -> Assigned:
        ways = [(h, nic) for h in held for nic in range(self._nics[h.owner])]
        best, nic = min(ways, key=lambda w: (self._sent[w[0].owner, w[1]], w[0].owner, w[1]))
        to = min(group, key=lambda r: (self._received[r.rank], r.rank))
        return Assigned(to.rank, best, nic)
