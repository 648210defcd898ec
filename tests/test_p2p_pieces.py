"""What a piece of a plan reads, and how it is lifted: the bytes that end up in the bucket are those of its tensors."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import example, given
from hypothesis import strategies as st

from checkpoint_engine.devices.cpu import CpuDevice
from checkpoint_engine.manifest import Manifest, RankManifest, RegionMeta, TensorMeta
from checkpoint_engine.planning.buckets import plan_broadcast
from checkpoint_engine.planning.landing import held_tensors, lay_out_runs, place_pieces
from checkpoint_engine.planning.peers import Receiver, as_manifest, plan_fetch
from checkpoint_engine.planning.plan import Piece
from checkpoint_engine.server.fetch import Feed
from checkpoint_engine.server.supply import Want, join_ops, wants_of
from checkpoint_engine.transport.peer.base import ReadOp

SIZES = st.lists(st.integers(0, 3000), min_size=1, max_size=12)


class _Slots:
    """As much of a Supply as Feed looks at: how many slots there are."""

    def __init__(self, count: int) -> None:
        self.slots = [None] * count


def _region(prefix: str, sizes: Sequence[int], gap: int) -> RegionMeta:
    tensors, offset = [], 0
    for number, size in enumerate(sizes):
        tensors.append(TensorMeta(f"model.layers.{number % 3}.{prefix}{number}.weight", "uint8", (size,), offset))
        offset += size + gap
    return RegionMeta(max(1, offset), tuple(tensors))


def _checkpoint(parts: Sequence[Sequence[int]], gap: int) -> tuple[Manifest, dict[tuple[int, int], bytes], dict[str, bytes]]:
    """Ranks with a region each, the regions' bytes, and the tensors' bytes."""
    ranks = tuple(RankManifest(r, f"host-{r}", "", (_region(f"r{r}x", sizes, gap),)) for r, sizes in enumerate(parts))
    memory = {(r.rank, 0): random.Random(r.rank).randbytes(r.regions[0].nbytes) for r in ranks}
    tensors = {t.name: memory[r.rank, 0][t.offset : t.offset + t.nbytes] for r in ranks for t in r.regions[0].tensors}
    return Manifest("c", ranks), memory, tensors


def _read(
    slot: bytearray, wants: Sequence[Want], places: dict[str, tuple[int, int]], memory: dict[tuple[int, int], bytes]
) -> None:
    """As Supply does: neighbours in one go. places: tensor -> (source rank, offset)."""
    for source in {places[want.tensor][0] for want in wants}:
        ops = [ReadOp(0, places[w.tensor][1] + w.start, w.nbytes, w.target) for w in wants if places[w.tensor][0] == source]
        for op in join_ops(ops):
            slot[op.target : op.target + op.nbytes] = memory[source, 0][op.offset : op.offset + op.nbytes]


def _lift(bucket: bytearray, piece: Piece, regions: Sequence[bytes | bytearray]) -> None:
    for copy in piece.copies:
        bucket[copy.offset : copy.offset + copy.nbytes] = regions[copy.region][copy.source : copy.source + copy.nbytes]


@example([[0, 0, 0, 1]], 0, 256, False, False)  # empty tensors at the offset of another
@given(
    st.lists(SIZES, min_size=1, max_size=3), st.integers(0, 300), st.sampled_from([256, 1024, 4096]), st.booleans(), st.booleans()
)
def test_buckets_hold_their_tensors(parts: list[list[int]], gap: int, piece_bytes: int, member: bool, into_ring: bool) -> None:
    """member: rank 0 is a source and a receiver: its own bytes are lifted from its region, and not read. into_ring: what is read
    goes straight to its place."""
    manifest, memory, tensors = _checkpoint(parts, gap)
    places = {t.name: (r.rank, t.offset) for r in manifest.ranks for t in r.regions[0].tensors}
    me = 0 if member else len(parts)
    reads = plan_fetch(manifest, [[Receiver(me, "here")]])
    derived, sources = as_manifest(reads.groups[0], manifest)
    plan = plan_broadcast(derived, bucket_bytes=4096, ring_bytes=16384, piece_bytes=piece_bytes)
    own = {number: region for number, (rank, region) in enumerate(sources) if rank == me}
    device = CpuDevice() if into_ring else None
    feed = Feed(_Slots(0 if into_ring else 1), derived.ranks[0].regions, own, 1.0, device)  # type: ignore[arg-type]
    read = 0
    for bucket in plan.buckets:
        filled = bytearray(bucket.nbytes)
        for piece in bucket.pieces:
            slot = bytearray(piece_bytes)
            wants = feed.wants(piece)
            _read(slot, wants, places, memory)
            read += sum(want.nbytes for want in wants)
            if into_ring:
                filled[piece.offset : piece.offset + piece.nbytes] = slot[: piece.nbytes]
            _lift(filled, feed.staged(piece, 0), [memory[0, 0]] if into_ring else [slot, memory[0, 0]])
        for item in bucket.items:
            assert filled[item.offset : item.offset + item.nbytes] == tensors[item.name]
    assert read == sum(len(data) for name, data in tensors.items() if places[name][0] != me)


@given(
    st.lists(SIZES, min_size=1, max_size=3),
    st.sampled_from([256, 1024, 4096]),
    st.integers(1, 3),
    st.sets(st.integers(0, 60), max_size=3),
)
def test_what_was_read_can_be_served(parts: list[list[int]], piece_bytes: int, receivers: int, lost: set[int]) -> None:
    """Pieces stay where Landing says, and the tensors are whole there; but those of pieces that had to go elsewhere.

    lost: numbers of such pieces, of each receiver's."""
    manifest, memory, tensors = _checkpoint(parts, 100)
    places = {t.name: (r.rank, t.offset) for r in manifest.ranks for t in r.regions[0].tensors}
    group = [Receiver(len(parts) + n, "here") for n in range(receivers)]
    reads = plan_fetch(manifest, [group])
    derived, _ = as_manifest(reads.groups[0], manifest)
    plan = plan_broadcast(derived, bucket_bytes=4096, ring_bytes=16384, piece_bytes=piece_bytes)
    found: list[str] = []
    for rank in derived.ranks:
        feed = Feed(_Slots(1), rank.regions, {}, 1.0)  # type: ignore[arg-type]
        runs, nbytes = lay_out_runs(plan, rank.rank)
        landed = bytearray(nbytes)
        gone, spoilt = [], set()
        for number, (piece, place) in enumerate(place_pieces(plan, rank.rank, runs)):
            assert place % 256 == piece.offset % 256
            wants = feed.wants(piece)
            if number in lost:
                gone.append((place, piece.nbytes))
                spoilt |= {want.tensor for want in wants}
                continue
            slot = bytearray(piece_bytes)
            _read(slot, wants, places, memory)
            assert not any(landed[place : place + piece.nbytes])  # nobody else's
            landed[place : place + piece.nbytes] = slot[: piece.nbytes]
        own = [tensor for region in rank.regions for tensor in region.tensors]
        held = held_tensors(plan, runs, own, gone)
        assert [t.offset for t in held] == sorted(t.offset for t in held)
        for tensor in held:
            assert landed[tensor.offset : tensor.offset + tensor.nbytes] == tensors[tensor.name]
        assert {t.name for t in own} - {t.name for t in held} == spoilt
        found += [t.name for t in held] + sorted(spoilt)
    assert sorted(found) == sorted(tensors)


@given(SIZES, st.integers(0, 300), st.data())
def test_wants_cover_what_a_range_holds(sizes: list[int], gap: int, data: st.DataObject) -> None:
    region = _region("x", sizes, gap)
    start = data.draw(st.integers(0, region.nbytes))
    nbytes = data.draw(st.integers(0, region.nbytes - start))
    found = {w.tensor: w for w in wants_of(region.tensors, start, nbytes, 7)}
    for tensor in region.tensors:
        inside = range(max(start, tensor.offset), min(start + nbytes, tensor.offset + tensor.nbytes))
        if len(inside):
            assert found[tensor.name] == Want(tensor.name, inside.start - tensor.offset, len(inside), 7 + inside.start - start)
        else:
            assert tensor.name not in found
