"""Properties of plans, over manifests of all kinds."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.errors import CheckpointNotFoundError, ManifestError, SettingsError
from checkpoint_engine.manifest import ITEMSIZE, Manifest, RankManifest, RegionMeta, TensorMeta
from checkpoint_engine.planning import ALIGNMENT, Bucket, Plan, Sizes, default_sizes, layer_of, plan_broadcast, together
from checkpoint_engine.settings import MIB

MLA = ("q_a_proj.weight", "q_a_proj.weight_scale_inv", "kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.weight_scale_inv")


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """1 to 4 ranks; tensors of 0 to about 4 KiB in 1 to 2 regions, some on several ranks, some that load together."""
    world = draw(st.integers(1, 4))
    leaves = ("a.weight", "a.bias", "experts.0.w", "experts.10.w", *MLA)
    names = [f"layers.{layer}.{leaf}" for layer in draw(st.sets(st.integers(0, 12), max_size=4)) for leaf in leaves]
    names = draw(st.lists(st.sampled_from([*names, "embed.weight", "head.weight"]), unique=True, min_size=1))
    regions: list[list[list[TensorMeta]]] = [[[] for _ in range(draw(st.integers(1, 2)))] for _ in range(world)]
    ends = [[0] * len(r) for r in regions]
    for name in names:
        dtype = draw(st.sampled_from(["uint8", "bfloat16", "float32"]))
        shape = draw(st.sampled_from([(), (0,), (1,), (3, 0, 2), (5, 7), (256,), (16, 64), (999,), (1025,)]))
        for rank in draw(st.sets(st.integers(0, world - 1), min_size=1)):
            index = draw(st.integers(0, len(regions[rank]) - 1))
            offset = ends[rank][index] + draw(st.sampled_from([0, 0, 0, 1, 100, 300]))
            digest = draw(st.sampled_from([0, 77]))
            regions[rank][index].append(TensorMeta(name, dtype, shape, offset, digest))
            ends[rank][index] = offset + math.prod(shape) * ITEMSIZE[dtype]
    return Manifest(
        "c",
        tuple(
            RankManifest(r, "h", "cpu", tuple(RegionMeta(ends[r][i], tuple(t)) for i, t in enumerate(regions[r])))
            for r in range(world)
        ),
    )


sizes = st.tuples(
    st.sampled_from([256, 512, 1000, 4096, 16384]),
    st.sampled_from([256, 2048, 5000, 40000]),
    st.sampled_from([None, 256, 700, 2048]),
)
Size = tuple[int, int, int | None]


def planned(manifest: Manifest, size: Size) -> Plan:
    return plan_broadcast(manifest, bucket_bytes=size[0], ring_bytes=size[1], piece_bytes=size[2])


@settings(max_examples=200)
@given(manifests(), sizes)
def test_every_byte_comes_once_from_a_holder(manifest: Manifest, size: Size) -> None:
    plan = planned(manifest, size)
    held = {(r.rank, t.name): (i, t) for r in manifest.ranks for i, g in enumerate(r.regions) for t in g.tensors}
    metas = {t.name: t for _, t in held.values()}
    items = [item for bucket in plan.buckets for item in bucket.items]
    assert sorted(i.name for i in items) == sorted(metas)
    for bucket in plan.buckets:
        # byte of the bucket -> (owner, region, byte of the region)
        came: dict[int, tuple[int, int, int]] = {}
        for piece in bucket.pieces:
            for copy in piece.copies:
                assert piece.offset <= copy.offset and copy.offset + copy.nbytes <= piece.offset + piece.nbytes
                assert 0 <= copy.source <= manifest.ranks[piece.owner].regions[copy.region].nbytes - copy.nbytes
                for byte in range(copy.nbytes):
                    assert copy.offset + byte not in came
                    came[copy.offset + byte] = (piece.owner, copy.region, copy.source + byte)
        for item in bucket.items:
            meta = metas[item.name]
            assert (item.dtype, item.shape, item.nbytes) == (meta.dtype, meta.shape, meta.nbytes)
            assert item.offset % ALIGNMENT == 0
            assert item.offset + item.nbytes <= bucket.nbytes
            if item.nbytes:
                owner = came[item.offset][0]
                region, where = held[owner, item.name]
                expected = [(owner, region, where.offset + byte) for byte in range(item.nbytes)]
                assert [came.pop(item.offset + byte) for byte in range(item.nbytes)] == expected
        assert len(came) < ALIGNMENT * len(bucket.items)  # what is left fills gaps


@settings(max_examples=200)
@given(manifests(), sizes)
def test_sizes_and_pieces(manifest: Manifest, size: Size) -> None:
    plan = planned(manifest, size)
    assert plan.piece_bytes <= (size[2] or size[0])
    assert plan.bucket_bytes <= size[0]
    for bucket in plan.buckets:
        full = [item for item in bucket.items if item.nbytes]
        if bucket.nbytes > plan.bucket_bytes:
            groups = {together(item.name) for item in full}
            assert len(full) == 1 or (len(groups) == 1 and None not in groups)
        assert bucket.nbytes == max((i.offset + i.nbytes for i in full), default=0)
        for a, b in itertools.pairwise(sorted(full, key=lambda i: i.offset)):
            assert 0 <= b.offset - (a.offset + a.nbytes) < ALIGNMENT
        end = 0
        for piece in bucket.pieces:
            assert 0 < piece.nbytes <= plan.piece_bytes
            assert piece.copies[0].offset == piece.offset
            assert 0 <= piece.offset - end < ALIGNMENT
            end = piece.offset + piece.nbytes
        assert end == bucket.nbytes
        if len({p.owner for p in bucket.pieces}) > 1:
            assert len({together(item.name) for item in full}) == 1
    named = [{together(i.name) for i in b.items} - {None} for b in plan.buckets]
    for one, two in itertools.combinations(named, 2):
        assert not one & two or all(not i.nbytes for b in plan.buckets for i in b.items if together(i.name) in one & two)


def overlapping(a: Bucket, b: Bucket) -> bool:
    return a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes


@settings(max_examples=200)
@given(manifests(), sizes)
def test_the_stream_has_every_piece_once_and_buckets_as_they_are_complete(manifest: Manifest, size: Size) -> None:
    plan = planned(manifest, size)
    assert sorted(plan.stream) == [(k, n) for k, bucket in enumerate(plan.buckets) for n in range(len(bucket.pieces))]
    for k in range(len(plan.buckets)):
        numbers = [n for index, n in plan.stream if index == k]
        assert numbers == sorted(numbers)
    if plan.stream:
        assert all(bucket.pieces for bucket in plan.buckets)
        assert [k for k, n in plan.stream if n + 1 == len(plan.buckets[k].pieces)] == list(range(len(plan.buckets)))
    else:
        assert len(plan.buckets) == 1


@settings(max_examples=200)
@given(manifests(), sizes)
def test_ring_never_overwrites_what_is_not_loaded(manifest: Manifest, size: Size) -> None:
    plan = planned(manifest, size)
    begun: list[Bucket] = []
    for k, number in plan.stream:
        bucket = plan.buckets[k]
        if number == 0:
            # Also a lift straight into the ring, which may be long before its turn in the stream, waits for `after` alone.
            assert not any(overlapping(bucket, other) for other in begun if plan.buckets.index(other) > bucket.after)
            begun.append(bucket)
    ring = size[1] - size[1] % ALIGNMENT
    for bucket in plan.buckets:
        assert bucket.offset % ALIGNMENT == 0
        large = bucket.nbytes > plan.bucket_bytes
        assert (ring if large else 0) <= bucket.offset <= (plan.ring_bytes if large else ring) - bucket.nbytes
    largest = max(b.nbytes for b in plan.buckets)
    assert plan.ring_bytes <= ring + (2 * (largest + ALIGNMENT) if largest > plan.bucket_bytes else 0)


@settings(max_examples=300)
@given(manifests(), sizes, st.integers(0, 2))
def test_no_piece_waits_for_one_behind_it(manifest: Manifest, size: Size, staging: int) -> None:
    """All owners lift as far ahead as they can, and buckets are loaded only when a piece cannot go on without."""
    plan = planned(manifest, size)
    own: dict[int, list[tuple[int, int]]] = {}
    for k, n in plan.stream:
        own.setdefault(plan.buckets[k].pieces[n].owner, []).append((k, n))
    lifted, shared = dict.fromkeys(own, 0), dict.fromkeys(own, 0)
    complete = loaded = -1

    def lift() -> None:
        for owner, pieces in own.items():
            while lifted[owner] < len(pieces):
                if staging and lifted[owner] - shared[owner] >= staging:
                    break
                if not staging and plan.buckets[pieces[lifted[owner]][0]].after > loaded:
                    break
                lifted[owner] += 1

    for k, n in plan.stream:
        bucket = plan.buckets[k]
        lift()
        if bucket.after > loaded:
            assert n == 0 and bucket.after <= complete, "waits for a bucket that is complete later"
            loaded = bucket.after
            lift()
        owner = bucket.pieces[n].owner
        assert lifted[owner] > shared[owner], "waits for a lift that waits for it"
        assert own[owner][shared[owner]] == (k, n)
        shared[owner] += 1
        if n + 1 == len(bucket.pieces):
            complete = k
    assert complete == len(plan.buckets) - 1 or not plan.stream


@given(manifests(), sizes)
def test_plans_are_equal_everywhere_and_survive_the_wire(manifest: Manifest, size: Size) -> None:
    plan = planned(manifest, size)
    received = Manifest.from_json(manifest.to_json())
    assert planned(received, size).digest == plan.digest
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=Plan) == plan
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan


def holding(*ranks: list[TensorMeta]) -> Manifest:
    return Manifest("c", tuple(RankManifest(r, "h", "cpu", (RegionMeta(1 << 40, tuple(t)),)) for r, t in enumerate(ranks)))


def row(count: int, layers: range) -> list[TensorMeta]:
    """`count` tensors of 32 MiB in each of `layers`, one after the other."""
    names = [f"layers.{layer}.w{i:02}" for layer in layers for i in range(count)]
    return [TensorMeta(name, "uint8", (32 * MIB,), i * 32 * MIB) for i, name in enumerate(names)]


def test_owners_side_by_side_when_they_hold_runs_of_layers() -> None:
    halves = holding(row(8, range(20)), row(8, range(20, 40)))
    plan = plan_broadcast(halves, bucket_bytes=64 * MIB, ring_bytes=192 * MIB)
    assert plan.order == "owners"
    assert [b.pieces[0].owner for b in plan.buckets[:6]] == [0, 1, 0, 1, 0, 1]


def test_layer_order_when_layers_are_striped() -> None:
    both = row(8, range(40))
    striped = holding([t for t in both if int(t.name[-2:]) < 4], [t for t in both if int(t.name[-2:]) >= 4])
    plan = plan_broadcast(striped, bucket_bytes=64 * MIB, ring_bytes=192 * MIB)
    assert plan.order == "layers"
    layers = [int(item.name.split(".")[1]) for bucket in plan.buckets for item in bucket.items]
    assert layers == sorted(layers)


def test_neighbours_are_copied_in_one_go() -> None:
    plan = plan_broadcast(holding(row(4, range(1))), bucket_bytes=128 * MIB, ring_bytes=192 * MIB)
    assert [len(p.copies) for b in plan.buckets for p in b.pieces] == [1]


def test_a_large_tensor_is_cut_and_lies_behind_the_ring() -> None:
    tensors = [TensorMeta("embed", "uint8", (1000 * MIB,), 0), TensorMeta("head", "uint8", (900 * MIB,), 1000 * MIB)]
    plan = plan_broadcast(holding(tensors), bucket_bytes=128 * MIB, ring_bytes=384 * MIB, piece_bytes=64 * MIB)
    assert plan.ring_bytes == 1384 * MIB
    assert [len(b.pieces) for b in plan.buckets] == [16, 15]
    assert [(b.offset, b.after) for b in plan.buckets] == [(384 * MIB, -1), (384 * MIB, 0)]


def test_all_owners_lift_beside_a_large_tensor() -> None:
    embed = TensorMeta("embed", "uint8", (640 * MIB,), 0)
    plan = plan_broadcast(holding([embed], row(8, range(20))), bucket_bytes=128 * MIB, ring_bytes=384 * MIB, piece_bytes=64 * MIB)
    owners = [plan.buckets[k].pieces[n].owner for k, n in plan.stream]
    assert plan.order == "layers"
    assert all(owners[i : i + 4].count(0) == 2 for i in range(0, 20, 4))


def test_layers_are_not_far_ahead_of_a_large_tensors_owner() -> None:
    """Rank 0 brings the embedding, then half of every layer: rank 1 has so much more room, but waits for layer 0."""
    halves = row(8, range(20))
    mine = [TensorMeta("embed", "uint8", (6400 * MIB,), 0), *(t for t in halves if int(t.name[-2:]) < 4)]
    theirs = [t for t in halves if int(t.name[-2:]) >= 4]
    plan = plan_broadcast(holding(mine, theirs), bucket_bytes=128 * MIB, ring_bytes=384 * MIB, piece_bytes=64 * MIB)
    names = [item.name for bucket in plan.buckets for item in bucket.items]
    before = {layer_of(name) for name in names[: names.index("embed")]}
    assert before == {f"layers.{n}" for n in range(4)}


def test_large_tensors_of_several_owners_side_by_side() -> None:
    """Every layer is a tensor larger than a bucket, on one rank and the other in turn."""
    layers = [TensorMeta(f"layers.{n}.w", "uint8", (256 * MIB,), n * 256 * MIB) for n in range(20)]
    plan = plan_broadcast(holding(layers[::2], layers[1::2]), bucket_bytes=128 * MIB, ring_bytes=384 * MIB, piece_bytes=64 * MIB)
    assert plan.ring_bytes == (384 + 2 * 256) * MIB
    owners = [plan.buckets[k].pieces[n].owner for k, n in plan.stream]
    assert all(owners[i : i + 2].count(0) == 1 for i in range(0, len(owners), 2))


def test_copies_of_a_checkpoint_are_balanced() -> None:
    everything = row(8, range(10))
    plan = plan_broadcast(holding(*[everything] * 4), bucket_bytes=64 * MIB, ring_bytes=192 * MIB)
    brought = [sum(p.nbytes for b in plan.buckets for p in b.pieces if p.owner == owner) for owner in range(4)]
    assert len(set(brought)) == 1


def test_a_group_on_several_owners_is_one_bucket() -> None:
    first = TensorMeta("layers.0.q_a_proj.weight", "uint8", (1000,), 0)
    second = TensorMeta("layers.0.kv_a_proj_with_mqa.weight", "uint8", (3000,), 4)
    plan = plan_broadcast(holding([first], [second]), bucket_bytes=2048, ring_bytes=8192)
    (bucket,) = plan.buckets
    assert {p.owner for p in bucket.pieces} == {0, 1}
    assert len(bucket.pieces) == 3


def test_a_small_group_on_several_owners_has_its_bucket_to_itself() -> None:
    names = ("a.weight", "kv_a_proj_with_mqa.weight", "q_a_proj.weight", "z.weight")
    tensors = [TensorMeta(f"layers.0.{name}", "uint8", (256,), 0) for name in names]
    plan = plan_broadcast(holding([tensors[0], tensors[1]], [tensors[2], tensors[3]]), bucket_bytes=4096, ring_bytes=8192)
    found = sorted([i.name.split(".")[2] for i in b.items] for b in plan.buckets)
    assert found == [["a"], ["kv_a_proj_with_mqa", "q_a_proj"], ["z"]]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (TensorMeta("t", "int8", (4,), 0), "dtype"),
        (TensorMeta("t", "uint8", (2, 2), 0), "shape"),
        (TensorMeta("t", "uint8", (4,), 0, 6), "bytes"),
    ],
)
def test_ranks_that_disagree(other: TensorMeta, says: str) -> None:
    unnamed = TensorMeta("t", "uint8", (4,), 0)
    with pytest.raises(ManifestError, match=rf"'t'.*{says}") as caught:
        plan_broadcast(holding([TensorMeta("t", "uint8", (4,), 0, 5)], [], [other], [unnamed]), bucket_bytes=256, ring_bytes=256)
    assert "rank 0" in str(caught.value) and "rank 2" in str(caught.value)


@pytest.mark.parametrize("bad", [("int3", (4,), 0), ("uint8", (4,), 1 << 40), ("uint8", (-4,), 8), ("uint8", (4,), -1)])
def test_manifests_that_cannot_be_true(bad: tuple[str, tuple[int, ...], int]) -> None:
    with pytest.raises(ManifestError, match="'t' on rank 0"):
        plan_broadcast(holding([TensorMeta("t", *bad)]), bucket_bytes=256, ring_bytes=256)


def test_nothing_to_plan() -> None:
    with pytest.raises(CheckpointNotFoundError, match="'c' is not registered on any rank"):
        plan_broadcast(holding([], []), bucket_bytes=256, ring_bytes=256)
    with pytest.raises(SettingsError):
        plan_broadcast(holding(row(1, range(1))), bucket_bytes=255, ring_bytes=256)


def test_only_empty_tensors() -> None:
    tensors = [TensorMeta("a", "uint8", (0,), 0), TensorMeta("b", "int8", (0, 3), 0)]
    plan = plan_broadcast(holding(tensors), bucket_bytes=256, ring_bytes=256)
    (bucket,) = plan.buckets
    assert [i.name for i in bucket.items] == ["a", "b"]
    assert bucket.nbytes == 0 and bucket.pieces == ()


@pytest.mark.parametrize(
    ("device", "world", "free", "wanted"),
    [
        ("cuda", 2, 10_000, (128, 384, 64)),
        ("cuda", 128, 10_000, (128, 384, 128)),
        ("cuda", 1024, 10_000, (256, 768, 256)),
        ("cuda", 8, 380, (84, 252, 64)),  # 2 pieces of staging
        ("cuda", 8, 256, (64, 128, 64)),
        ("cuda", 8, 192, (64, 64, 64)),
        ("cuda", 8, 30, (10, 10, 10)),
        ("cuda", 1, 128, (64, 128, 64)),
        ("cpu", 4, 10_000, (16, 64, 16)),
        ("cpu", 4, 50, (16, 48, 16)),
        ("cpu", 4, 8, (8, 8, 8)),
    ],
)
def test_default_sizes(device: str, world: int, free: int, wanted: tuple[int, int, int]) -> None:
    assert default_sizes(device, world, free * MIB, 1.0) == Sizes(*(size * MIB for size in wanted))


@given(
    st.sampled_from(["cuda", "cpu"]), st.integers(1, 2000), st.integers(0, 1 << 34), st.floats(0.01, 1),
    st.none() | st.integers(4096, 1 << 33), st.none() | st.integers(4096, 1 << 33),
)  # fmt: skip
def test_sizes_always_fit(device: str, world: int, free: int, part: float, bucket: int | None, ring: int | None) -> None:
    staging = 2 if device == "cuda" and world > 1 else 0
    try:
        got = default_sizes(device, world, free, part, bucket, ring)
    except ManifestError:
        assert int(free * part) < (staging + 1) * (4096 + ALIGNMENT)
        return
    assert 4096 <= got.piece_bytes <= got.bucket_bytes <= got.ring_bytes
    assert got.bucket_bytes <= (bucket or 1 << 62) and got.ring_bytes <= (ring or 1 << 62)
    assert got.ring_bytes + staging * got.piece_bytes <= free * part
    assert got.piece_bytes % ALIGNMENT == got.bucket_bytes % ALIGNMENT == got.ring_bytes % ALIGNMENT == 0
