"""Where workers find tensors that they read in the owners' regions, and in what groups."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.manifest import Manifest
from checkpoint_engine.planning.digests import pack, unpack
from checkpoint_engine.planning.mapped import grouped, mapped_items
from test_planning_buckets import manifests, planned

SIZES = st.sampled_from([0, 1, 100, 3000, 20_000, 1 << 40])


@settings(max_examples=150)
@given(manifests(), SIZES)
def test_groups_are_the_buckets_in_their_order_as_many_as_fit(manifest: Manifest, nbytes: int) -> None:
    plan = planned(manifest, (512, 2048, 256))
    pulled, groups = grouped(plan, nbytes)
    assert [number for group in groups for number in group] == list(range(len(plan.buckets)))
    held = [sum(item.nbytes for number in group for item in plan.buckets[number].items) for group in groups]
    assert all(size <= nbytes or len(group) == 1 for size, group in zip(held, groups, strict=True))
    firsts = [sum(item.nbytes for item in plan.buckets[group[0]].items) for group in groups]
    assert all(size + first > nbytes for size, first in zip(held, firsts[1:], strict=False)), "no more would have fitted"
    assert [i for bucket in pulled.buckets for i in bucket.items] == [i for bucket in plan.buckets for i in bucket.items]
    assert pulled.nbytes == plan.nbytes and not pulled.stream


@settings(max_examples=150)
@given(manifests())
def test_every_tensor_is_where_its_owner_has_it(manifest: Manifest) -> None:
    regions = [region for rank in manifest.ranks for region in rank.regions]
    held = [{tensor.name: tensor for tensor in region.tensors} for region in regions]
    plan = planned(manifest, (512, 2048, 256))
    for items, bucket in zip(mapped_items(plan, manifest), plan.buckets, strict=True):
        assert [item.name for item in items] == [item.name for item in bucket.items]
        for item in items:
            if item.nbytes:
                assert held[item.memory][item.name].offset == item.offset


@given(st.lists(st.integers(0, (1 << 64) - 1)))
def test_digests_are_packed_and_unpacked(digests: list[int]) -> None:
    packed = pack(digests)
    assert list(unpack(packed)) == digests
    assert packed == b"".join(digest.to_bytes(8, "little") for digest in digests)
