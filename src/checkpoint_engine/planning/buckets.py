"""From a manifest to the stream of one broadcast pass: which tensors share a bucket, in which order, at which place."""

from __future__ import annotations

from collections.abc import Sequence

from checkpoint_engine.errors import CheckpointNotFoundError, ManifestError, SettingsError
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.planning.cost import H200, Rates, predict
from checkpoint_engine.planning.holders import choose_holders
from checkpoint_engine.planning.packing import Draft, pack
from checkpoint_engine.planning.plan import ALIGNMENT, Plan
from checkpoint_engine.planning.stream import AHEAD, AHEAD_OF_SMALL, Interleaver, by_progress

OWNERS_GAIN = 1.10
"""The order "owners" must be predicted this many times as fast: it keeps many modules half loaded, and engines are slow
then (vLLM's layerwise reload: quadratic in the tensors buffered for them)."""

MAX_PIECES = 1 << 22
"""Of what is not one tensor each: 256 TiB in pieces of 64 MiB. A manifest that claims more would take the memory for its plan."""


def plan_broadcast(
    manifest: Manifest,
    *,
    bucket_bytes: int,
    ring_bytes: int,
    piece_bytes: int | None = None,
    rates: Rates = H200,
    staging: int = 2,
) -> Plan:
    """Plan a pass in which every rank receives every tensor of `manifest`.

    bucket_bytes  what lies in the ring: a larger bucket, which one tensor or a group that must load together can be, lies
                  behind it. At most `ring_bytes`
    ring_bytes    size of the ring; where there are larger buckets, an area for them is added behind it: as large as the
                  largest and, where they are many, as two of them
    piece_bytes   what is lifted and shared in one go, at most, and up to which tensors are put together in a bucket;
                  default: `bucket_bytes`
    rates         to predict which order is faster
    staging       pieces that an owner can lift ahead of their sharing

    The order is "layers", the model's own over all owners, unless "owners", in which every owner's stream advances in
    proportion, is predicted more than 10 % faster: as when each owner holds a whole run of layers, and would lift alone.
    In both, pieces of a bucket alternate with what other owners bring in: see planning.stream.

    A function of its arguments alone: equal on all ranks. Raises CheckpointNotFoundError when no rank holds a tensor,
    ManifestError when ranks disagree on one, SettingsError for sizes too small to align anything in.
    """
    ring_bytes -= ring_bytes % ALIGNMENT
    bucket_bytes = min(bucket_bytes - bucket_bytes % ALIGNMENT, ring_bytes)
    piece_bytes = bucket_bytes if piece_bytes is None else piece_bytes - piece_bytes % ALIGNMENT
    if min(bucket_bytes, piece_bytes) <= 0:
        raise SettingsError(f"bucket_bytes, ring_bytes and piece_bytes must be at least {ALIGNMENT}")
    units = choose_holders(manifest)
    if not units:
        raise CheckpointNotFoundError(manifest.checkpoint, "on any rank")
    _check_size(manifest.nbytes, piece_bytes)
    drafts = pack(units, min(piece_bytes, bucket_bytes))
    for draft in drafts:
        draft.finish(piece_bytes)

    def plan(order: str, drafts: Sequence[Draft], ahead: tuple[int, int] | None) -> Plan:
        interleaver = Interleaver(drafts, ring_bytes, bucket_bytes, ahead)
        return Plan(interleaver.ring_bytes, bucket_bytes, piece_bytes, order, *interleaver.run())

    layers = plan("layers", drafts, (AHEAD, AHEAD_OF_SMALL))
    if len({draft.owner for draft in drafts}) == 1:
        return layers
    owners = plan("owners", by_progress(drafts), None)
    expected = [predict(each, rates, manifest.world_size, staging=staging).seconds for each in (layers, owners)]
    return owners if expected[0] > OWNERS_GAIN * expected[1] else layers


def _check_size(nbytes: int, piece_bytes: int) -> None:
    if nbytes > MAX_PIECES * piece_bytes:
        raise ManifestError(f"{nbytes} bytes are more than {MAX_PIECES} pieces of {piece_bytes} bytes: no real checkpoint")
