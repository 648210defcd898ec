"""From a manifest to the stream of one broadcast pass: which tensors share a bucket, in which order, at which place."""

from __future__ import annotations

import dataclasses
from collections import defaultdict, deque
from collections.abc import Sequence
from itertools import groupby

from checkpoint_engine.errors import CheckpointNotFoundError, SettingsError
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.planning.cost import H200, Rates, predict
from checkpoint_engine.planning.holders import Held, choose_holders
from checkpoint_engine.planning.order import layer_of
from checkpoint_engine.planning.plan import ALIGNMENT, Bucket, Copy, Item, Piece, Plan

OWNERS_GAIN = 1.10
"""The order "owners" must be predicted this many times as fast: it keeps many modules half loaded, and engines are slow
then (vLLM's layerwise reload: quadratic in the tensors buffered for them)."""


def plan_broadcast(manifest: Manifest, *, bucket_bytes: int, ring_bytes: int, rates: Rates = H200, staging: int = 2) -> Plan:
    """Plan a pass in which every rank receives every tensor of `manifest`.

    bucket_bytes  no bucket is larger, unless one tensor, or a group that must load together, is; no piece ever is
    ring_bytes    size of the ring; raised to the largest bucket and `bucket_bytes` more where that bucket does not fit
    rates         to predict which order is faster
    staging       pieces that an owner can lift ahead of their sharing

    The order is "layers", the model's own over all owners, unless "owners", in which every owner's stream advances in
    proportion, is predicted more than 10 % faster: as when each owner holds a whole run of layers, and would lift alone.

    A function of its arguments alone: equal on all ranks. Raises CheckpointNotFoundError when no rank holds a tensor,
    ManifestError when ranks disagree on one, SettingsError for a bucket too small to align anything in.
    """
    bucket_bytes -= bucket_bytes % ALIGNMENT
    ring_bytes -= ring_bytes % ALIGNMENT
    if bucket_bytes <= 0 or ring_bytes <= 0:
        raise SettingsError(f"bucket_bytes and ring_bytes must be at least {ALIGNMENT}")
    units = choose_holders(manifest)
    if not units:
        raise CheckpointNotFoundError(manifest.checkpoint, "on any rank")
    drafts = _pack(units, bucket_bytes)
    for draft in drafts:
        draft.finish(bucket_bytes)

    largest = max(_aligned(draft.nbytes) for draft in drafts)
    if largest > ring_bytes:
        ring_bytes = largest + bucket_bytes
    layers = Plan(ring_bytes, bucket_bytes, "layers", _place(drafts, ring_bytes))
    if len({draft.owner for draft in drafts}) == 1:
        return layers
    owners = Plan(ring_bytes, bucket_bytes, "owners", _place(_by_progress(drafts), ring_bytes))
    expected = [predict(plan, rates, manifest.world_size, staging=staging).seconds for plan in (layers, owners)]
    return owners if expected[0] > OWNERS_GAIN * expected[1] else layers


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclasses.dataclass(slots=True, eq=False)
class _Draft:
    """A bucket that has no place yet.

    position  of its first unit in the model's order
    owner     who brings it in; of several, who holds its first tensor
    layer     of its first tensor
    last      position of its last unit
    passed    a larger unit of the same layer, in a bucket of its own, came after its first one
    """

    position: int
    owner: int
    layer: str
    last: int = 0
    nbytes: int = 0
    passed: bool = False
    held: list[tuple[Held, int]] = dataclasses.field(default_factory=list)
    items: tuple[Item, ...] = ()
    pieces: tuple[Piece, ...] = ()

    def add(self, unit: Sequence[Held]) -> None:
        for held in unit:
            # An empty tensor needs no place of its own; at 0 it is inside whatever the bucket's size.
            offset = _aligned(self.nbytes) if held.nbytes else 0
            self.held.append((held, offset))
            if held.nbytes:
                self.nbytes = offset + held.nbytes

    def finish(self, piece_bytes: int) -> None:
        self.items = tuple(Item(h.tensor.name, h.tensor.dtype, h.tensor.shape, offset, h.nbytes) for h, offset in self.held)
        full = ((held, offset) for held, offset in self.held if held.nbytes)
        runs = groupby(full, key=lambda pair: pair[0].owner)
        self.pieces = tuple(piece for owner, run in runs for piece in _cut(owner, list(run), piece_bytes))


def _pack(units: list[list[Held]], bucket_bytes: int) -> list[_Draft]:
    """Fill buckets of `bucket_bytes` with the units of each owner, in order, across layers; buckets in the model's order.

    A unit that is larger, or of several owners, gets a bucket of its own. The bucket that is being filled stays open
    beside it until the layer ends: the small tensors around large ones then share a bucket, none far ahead of its layer.
    A bucket that is three quarters full is closed rather than topped up with tensors that are not its neighbours.
    """
    drafts: list[_Draft] = []
    filling: dict[int, _Draft] = {}
    empty: list[Held] = []  # tensors of no bytes before the first bucket
    newest: _Draft | None = None
    for position, unit in enumerate(units):
        full = sorted((held for held in unit if held.nbytes), key=lambda held: held.owner)  # an owner's side by side
        nothing = [held for held in unit if not held.nbytes]
        if not full:  # needs nobody to bring it in: goes with its neighbour
            (newest.add(nothing) if newest else empty.extend(nothing))
            continue
        owner, layer = full[0].owner, layer_of(full[0].tensor.name)
        size = sum(_aligned(held.nbytes) for held in full)
        alone = size > bucket_bytes or full[-1].owner != owner
        current = filling.get(owner)
        if current and (
            (current.passed and current.layer != layer)
            or (current.last + 1 < position and 4 * current.nbytes >= 3 * bucket_bytes and current.layer != layer)
        ):
            current = None
        if alone and current:
            current.passed = True
        if current is None or alone or _aligned(current.nbytes) + size > bucket_bytes:
            newest = _Draft(position, owner, layer)
            drafts.append(newest)
            if not alone:
                filling[owner] = newest
        else:
            newest = current
        newest.last = position
        newest.add([*full, *nothing])
    if not drafts:
        drafts.append(_Draft(0, empty[0].owner, ""))
    drafts[0].add(empty)
    return drafts


def _cut(owner: int, run: list[tuple[Held, int]], piece_bytes: int) -> list[Piece]:
    """Cut a run of one owner's tensors, (tensor, offset in the bucket), into pieces of nearly equal size.

    Pieces of a large tensor are lifted, and shared, while its next ones are still being lifted.
    """
    start, end = run[0][1], run[-1][1] + run[-1][0].nbytes
    count = -(-(end - start) // piece_bytes)
    size = _aligned(-(-(end - start) // count))
    pieces = []
    first = 0
    for low in range(start, end, size):
        high = min(low + size, end)
        copies: list[Copy] = []
        while first < len(run) and run[first][1] < high:
            held, offset = run[first]
            begin, stop = max(offset, low), min(offset + held.nbytes, high)
            _append(copies, Copy(held.region, held.source + begin - offset, begin, stop - begin))
            if offset + held.nbytes > high:
                break
            first += 1
        # A cut may fall into the gap between two tensors: a piece is no longer than its bytes.
        pieces.append(Piece(owner, low, copies[-1].offset + copies[-1].nbytes - low, tuple(copies)))
    return pieces


def _append(copies: list[Copy], new: Copy) -> None:
    """Append `new`, or lengthen the last copy to take it in when the gap between them is the same at both ends: its
    bytes, fewer than ALIGNMENT, are copied along, and nobody reads them."""
    if copies:
        last = copies[-1]
        if last.region == new.region and new.source - new.offset == last.source - last.offset:
            copies[-1] = Copy(last.region, last.source, last.offset, new.offset + new.nbytes - last.offset)
            return
    copies.append(new)


def _by_progress(drafts: list[_Draft]) -> list[_Draft]:
    """All owners' streams side by side: whoever has brought in the smallest part of its own comes next."""
    total: dict[int, int] = defaultdict(int)
    for draft in drafts:
        total[draft.owner] += draft.nbytes
    done: dict[int, int] = defaultdict(int)
    progress = []
    for draft in drafts:
        progress.append((done[draft.owner] / max(1, total[draft.owner]), draft.owner, draft.position))
        done[draft.owner] += draft.nbytes
    return [draft for _, draft in sorted(zip(progress, drafts, strict=True), key=lambda pair: pair[0])]


def _place(drafts: list[_Draft], ring_bytes: int) -> tuple[Bucket, ...]:
    """Put buckets one after the other into the ring; one that does not fit at its end starts at 0 again."""
    buckets = []
    live: deque[tuple[int, int, int]] = deque()  # (start, end, index), oldest first: what the head comes upon next
    head, after = 0, -1
    for index, draft in enumerate(drafts):
        size = _aligned(draft.nbytes)
        if head + size > ring_bytes:
            while live and live[0][0] >= head:  # left over from the lap before, older than all that starts at 0
                live.popleft()
            head = 0
        while live and live[0][0] < head + size and live[0][1] > head:
            after = live.popleft()[2]
        buckets.append(Bucket(head, draft.nbytes, after, draft.items, draft.pieces))
        if size:
            live.append((head, head + size, index))
        head += size
    return tuple(buckets)
