"""Who reads what from whom: every byte once for each group, from somebody who holds it, evenly."""

from __future__ import annotations

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.errors import CheckpointNotFoundError, ManifestError, SettingsError
from checkpoint_engine.manifest import Manifest, RankManifest, RegionMeta, TensorMeta
from checkpoint_engine.planning import layer_key, plan_broadcast
from checkpoint_engine.planning.peers import FetchPlan, Receiver, as_manifest, plan_fetch, replace_sources

Groups = list[list[Receiver]]


def make_manifest(held_by: dict[str, tuple[int, list[int]]], hosts: list[str]) -> Manifest:
    """name -> (bytes, ranks that hold it). Each rank has its tensors in two regions, in turn."""
    ranks = []
    for rank, host in enumerate(hosts):
        regions: list[list[TensorMeta]] = [[], []]
        ends = [rank * 3, 0]  # not the same offsets everywhere
        mine = [(name, nbytes) for name, (nbytes, owners) in held_by.items() if rank in owners]
        for n, (name, nbytes) in enumerate(mine):
            regions[n % 2].append(TensorMeta(name, "uint8", (nbytes,), ends[n % 2]))
            ends[n % 2] += nbytes
        metas = tuple(RegionMeta(end + 1, tuple(tensors)) for end, tensors in zip(ends, regions, strict=True))
        ranks.append(RankManifest(rank, host, f"GPU-{rank}", metas))
    return Manifest("m", tuple(ranks))


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Manifest, Groups, dict[int, int]]:
    sources = draw(st.integers(1, 5))
    names = st.sampled_from([f"layers.{n}.{leaf}" for n in range(6) for leaf in ("a", "b", "c")])
    owners = st.lists(st.integers(0, sources - 1), min_size=1, unique=True)
    held_by = draw(st.dictionaries(names, st.tuples(st.integers(0, 500), owners), min_size=1))
    hosts = draw(st.lists(st.sampled_from("ABC"), min_size=sources, max_size=sources))
    members = [Receiver(n, hosts[n]) for n in range(sources) if draw(st.booleans())]
    members += [Receiver(100 + n, draw(st.sampled_from("ABCXY"))) for n in range(draw(st.integers(1, 5)))]
    cut = draw(st.integers(0, len(members)))
    groups = [group for group in (members[:cut], members[cut:]) if group]
    nics = draw(st.dictionaries(st.integers(0, sources - 1), st.integers(1, 4)))
    return make_manifest(held_by, hosts), groups, nics


def holders(manifest: Manifest) -> dict[str, set[int]]:
    found: dict[str, set[int]] = collections.defaultdict(set)
    for rank in manifest.ranks:
        for region in rank.regions:
            for tensor in region.tensors:
                found[tensor.name].add(rank.rank)
    return found


def check(plan: FetchPlan, manifest: Manifest, groups: Groups, nics: dict[int, int]) -> None:
    """Every tensor once for each group, in the model's order, read by a member, from where it is."""
    held = holders(manifest)
    hosts = {rank.rank: rank.host for rank in manifest.ranks}
    by_rank = {rank.rank: rank for rank in manifest.ranks}
    for reads, group in zip(plan.groups, groups, strict=True):
        assert [read.held.tensor.name for read in reads] == sorted(held, key=layer_key)
        member = {receiver.rank: receiver for receiver in group}
        for read in reads:
            owner, tensor = read.held.owner, read.held.tensor
            assert tensor in by_rank[owner].regions[read.held.region].tensors
            assert (read.held.source, read.held.nbytes) == (tensor.offset, tensor.nbytes)
            near = owner == read.receiver or hosts[owner] == member[read.receiver].host
            assert (read.nic == -1) == near
            assert read.nic < nics.get(owner, 1)


@given(worlds())
def test_each_byte_once_for_each_group(world: tuple[Manifest, Groups, dict[int, int]]) -> None:
    manifest, groups, nics = world
    plan = plan_fetch(manifest, groups, nics)
    check(plan, manifest, groups, nics)
    held = holders(manifest)
    hosts = {rank.rank: rank.host for rank in manifest.ranks}
    for reads, group in zip(plan.groups, groups, strict=True):
        members, here = {r.rank for r in group}, {r.host for r in group}
        for read in reads:
            owners = held[read.held.tensor.name]
            if owners & members:
                assert read.receiver == read.held.owner  # nothing is moved
            elif {hosts[owner] for owner in owners} & here:
                assert read.nic == -1
    assert plan == plan_fetch(manifest, groups, nics)


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=40),
    st.integers(1, 5),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(1, 3),
)
def test_even_over_sources_nics_and_members(sizes: list[int], sources: int, members: list[int], nics: int) -> None:
    manifest = make_manifest({f"layers.{n}.w": (size, list(range(sources))) for n, size in enumerate(sizes)}, ["A"] * sources)
    numbers = iter(range(100, 200))
    groups = [[Receiver(next(numbers), "B") for _ in range(count)] for count in members]
    plan = plan_fetch(manifest, groups, dict.fromkeys(range(sources), nics))
    sent = plan.bytes_by_nic()
    loads = [sent[rank, nic] for rank in range(sources) for nic in range(nics)]
    assert sum(loads) == sum(sizes) * len(groups)
    assert max(loads) - min(loads) <= max(sizes)
    received = plan.bytes_by_receiver()
    for group in groups:
        mine = [received[receiver.rank] for receiver in group]
        assert sum(mine) == sum(sizes)
        assert max(mine) - min(mine) <= max(sizes)


def test_what_one_rank_holds_alone_is_evened_out() -> None:
    held_by = {f"layers.{n}.w": (10, [0, 1]) for n in range(8)} | {f"layers.{n}.w": (10, [0]) for n in range(8, 12)}
    plan = plan_fetch(make_manifest(held_by, ["A", "A"]), [[Receiver(5, "B")]])
    assert plan.bytes_by_nic() == {(0, 0): 60, (1, 0): 60}


@given(worlds(), st.data())
def test_a_source_is_lost_on_the_way(world: tuple[Manifest, Groups, dict[int, int]], data: st.DataObject) -> None:
    manifest, groups, nics = world
    plan = plan_fetch(manifest, groups, nics)
    lost = data.draw(st.sets(st.sampled_from([rank.rank for rank in manifest.ranks])))
    done = [data.draw(st.sets(st.sampled_from([read.held.tensor.name for read in reads]))) for reads in plan.groups]
    left = {name: owners - lost for name, owners in holders(manifest).items()}
    needed = {
        read.held.tensor.name
        for reads, had in zip(plan.groups, done, strict=True)
        for read in reads
        if read.held.owner in lost and read.held.tensor.name not in had
    }
    if hopeless := [name for name in needed if not left[name]]:
        with pytest.raises(ManifestError, match=r"only ranks .* held it") as raised:
            replace_sources(plan, manifest, groups, lost, done, nics)
        assert any(repr(name) in str(raised.value) for name in hopeless)
        return
    renewed = replace_sources(plan, manifest, groups, lost, done, nics)
    check(renewed, manifest, groups, nics)
    for before, after, had in zip(plan.groups, renewed.groups, done, strict=True):
        for old, new in zip(before, after, strict=True):
            if old.held.owner not in lost or old.held.tensor.name in had:
                assert new == old
            else:
                assert new.held.owner not in lost


@given(worlds(), st.integers(512, 4096))
def test_a_groups_reads_make_a_broadcast(world: tuple[Manifest, Groups, dict[int, int]], bucket: int) -> None:
    """Planned as a pass of the group, every byte of every tensor comes from where it is read."""
    manifest, groups, nics = world
    wanted = {r.held.tensor.name: r for r in plan_fetch(manifest, groups, nics).groups[0]}
    within, sources = as_manifest(list(wanted.values()), manifest)
    plan = plan_broadcast(within, bucket_bytes=bucket, ring_bytes=4 * bucket)
    names = []
    for layout in plan.buckets:
        origin: dict[int, tuple[int, int, int, int]] = {}  # byte of the bucket -> receiver, source rank, region, byte there
        for piece in layout.pieces:
            for copy in piece.copies:
                for n in range(copy.nbytes):
                    origin[copy.offset + n] = (piece.owner, *sources[copy.region], copy.source + n)
        for item in layout.items:
            names.append(item.name)
            read = wanted[item.name]
            for n in range(item.nbytes):
                assert origin[item.offset + n] == (read.receiver, read.held.owner, read.held.region, read.held.source + n)
    assert sorted(names) == sorted(wanted)


def test_what_cannot_be_planned() -> None:
    manifest = make_manifest({"w": (4, [0])}, ["A", "A"])
    with pytest.raises(ManifestError, match=r"tensor 'w' cannot be read any more: only ranks \[0\] held it"):
        plan_fetch(manifest, [[Receiver(5, "B")]], lost=[0])
    for groups in ([[]], [[Receiver(5, "B")], [Receiver(5, "B")]]):
        with pytest.raises(SettingsError, match="receiver groups"):
            plan_fetch(manifest, groups)
    with pytest.raises(CheckpointNotFoundError):
        plan_fetch(make_manifest({}, ["A"]), [[Receiver(5, "B")]])
