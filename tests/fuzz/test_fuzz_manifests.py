"""Manifests from files and from other ranks: not one, or one that can be planned, or refused with a typed error."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.errors import CheckpointEngineError, ManifestError
from checkpoint_engine.manifest import ITEMSIZE, Manifest, RankManifest, RegionMeta, TensorMeta
from checkpoint_engine.planning.buckets import plan_broadcast
from checkpoint_engine.planning.digests import packed_digests
from checkpoint_engine.planning.mapped import mapped_items
from checkpoint_engine.transport.peer.base import PeerOffer, RegionOffer
from helpers.damage import INTEGERS, damaged, misshapen
from helpers.fuzzing import fuzz

REGIONS = (
    RegionMeta(4096, (TensorMeta("layers.0.w", "float32", (3, 4), 0, 7), TensorMeta("layers.1.w", "bfloat16", (8,), 256))),
    RegionMeta(10, (TensorMeta("b", "uint8", (10,), 0, 2**64 - 1),)),
)
RANKS = (RankManifest(0, "host-a", "GPU-0", REGIONS), RankManifest(1, "host-b", "GPU-1", REGIONS[:1]))
VALID = Manifest("c", RANKS)
TREE: Any = msgspec.to_builtins(VALID)
JSON, MSGPACK = VALID.to_json(), msgspec.msgpack.encode(VALID)
NOT_ONE = (msgspec.ValidationError, msgspec.DecodeError)
HOSTILE = st.builds(
    TensorMeta,
    name=st.sampled_from(["layers.0.w", "b", "", "x" * 300]),
    dtype=st.sampled_from([*sorted(ITEMSIZE)[:3], "", "object", "__class__"]),
    shape=st.lists(INTEGERS.filter(lambda n: n < 2**63), max_size=3).map(tuple),
    offset=INTEGERS.filter(lambda n: n < 2**63),
    digest=st.integers(0, 2**64 - 1),
)


def plan(manifest: Manifest) -> None:
    try:
        made = plan_broadcast(manifest, bucket_bytes=4096, ring_bytes=1 << 16, piece_bytes=4096)
    except CheckpointEngineError:
        return
    items = [item for bucket in made.buckets for item in bucket.items]
    held = {t.name: t for r in manifest.ranks for region in r.regions for t in region.tensors}
    assert sorted(item.name for item in items) == sorted(held), "each tensor once"
    assert all(item.nbytes == held[item.name].nbytes >= 0 for item in items)
    for bucket in made.buckets:
        assert bucket.offset >= 0 and bucket.offset + bucket.nbytes <= made.ring_bytes
        assert all(i.offset >= 0 and i.offset + i.nbytes <= bucket.nbytes for i in bucket.items)
        for piece in bucket.pieces:
            regions = next(r.regions for r in manifest.ranks if r.rank == piece.owner)
            for copy in piece.copies:
                assert copy.source >= 0 and copy.source + copy.nbytes <= regions[copy.region].nbytes
                assert copy.offset >= 0 and copy.offset + copy.nbytes <= bucket.nbytes
    assert len(packed_digests(made, manifest)) in (0, 8 * len(items))
    mapped_items(made, manifest)


def check(manifest: Manifest) -> None:
    assert len(manifest.version) >= 13 and len(manifest.layout_digest) == 32
    assert Manifest.from_json(manifest.to_json()) == manifest
    plan(manifest)


@fuzz
@given(damaged(JSON, most=8))
def test_json_of_damaged_bytes(data: bytes) -> None:
    try:
        manifest = Manifest.from_json(data)
    except NOT_ONE:
        return
    check(manifest)


@fuzz
@given(misshapen(TREE))
def test_json_of_another_structure(tree: Any) -> None:
    try:
        manifest = Manifest.from_json(json.dumps(tree).encode())
    except NOT_ONE:
        return
    check(manifest)


@fuzz
@given(damaged(MSGPACK, most=8))
def test_msgpack_of_damaged_bytes(data: bytes) -> None:
    try:
        manifest = msgspec.msgpack.decode(data, type=Manifest)
    except (*NOT_ONE, UnicodeDecodeError):
        return
    check(manifest)


@fuzz
@given(misshapen(TREE))
def test_msgpack_of_another_structure(tree: Any) -> None:
    try:
        manifest = msgspec.msgpack.decode(msgspec.msgpack.encode(tree), type=Manifest)
    except NOT_ONE:
        return
    check(manifest)


@fuzz
@given(st.lists(st.tuples(INTEGERS, st.lists(HOSTILE, max_size=3)), max_size=3))
def test_well_formed_manifests_of_hostile_contents(regions: list[tuple[int, list[TensorMeta]]]) -> None:
    metas = tuple(RegionMeta(nbytes, tuple(tensors)) for nbytes, tensors in regions)
    plan(Manifest("c", (RankManifest(0, "h", "d", metas), RankManifest(1, "h", "e", REGIONS))))


def test_what_is_nested_too_deeply() -> None:
    with pytest.raises(msgspec.DecodeError, match="nested too deeply"):
        Manifest.from_json(JSON[:-1] + b', "more": ' + b"[" * 100_000)
    with pytest.raises(msgspec.DecodeError, match="nested too deeply"):
        PeerOffer.from_json(b'{"more": ' + b"[" * 100_000)


def test_a_tensor_that_leaves_its_region() -> None:
    outside = RegionMeta(100, (TensorMeta("t", "uint8", (90,), 11),))
    with pytest.raises(ManifestError, match="'t' on rank 0"):
        plan_broadcast(Manifest("c", (RankManifest(0, "h", "d", (outside,)),)), bucket_bytes=4096, ring_bytes=1 << 16)


def test_a_manifest_that_would_fill_memory_with_its_plan() -> None:
    huge = RegionMeta(1 << 62, (TensorMeta("t", "uint8", (1 << 62,), 0),))
    with pytest.raises(ManifestError, match="no real checkpoint"):
        plan_broadcast(Manifest("c", (RankManifest(0, "h", "d", (huge,)),)), bucket_bytes=1 << 26, ring_bytes=1 << 28)


OFFER = PeerOffer("rank 0 (a)", (("127.0.0.1", 1),), "token", "here", ("tcp",), (RegionOffer(0, 5, 100),))


@fuzz
@given(st.one_of(damaged(OFFER.to_json(), most=8), misshapen(msgspec.to_builtins(OFFER)).map(lambda t: json.dumps(t).encode())))
def test_offers(data: bytes) -> None:
    try:
        offer = PeerOffer.from_json(data)
    except (*NOT_ONE, UnicodeDecodeError):
        return
    assert PeerOffer.from_json(offer.to_json()) == offer
