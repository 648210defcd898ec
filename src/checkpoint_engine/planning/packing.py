"""From tensors in their order to buckets: which share one, and the pieces that each is brought in by."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import groupby

from checkpoint_engine.planning.holders import Held
from checkpoint_engine.planning.order import layer_of
from checkpoint_engine.planning.plan import ALIGNMENT, Copy, Item, Piece


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclasses.dataclass(slots=True, eq=False)
class Draft:
    """A bucket that has no place yet.

    position  of its first unit in the model's order
    owner     who brings it in; of several, who holds its first tensor
    layer     of its first tensor
    layers    of all its tensors but the empty ones, in order
    last      position of its last unit
    owners    of its pieces
    passed    a larger unit of the same layer, in a bucket of its own, came after its first one
    """

    position: int
    owner: int
    layer: str
    last: int = 0
    nbytes: int = 0
    passed: bool = False
    layers: list[str] = dataclasses.field(default_factory=list)
    held: list[tuple[Held, int]] = dataclasses.field(default_factory=list)
    items: tuple[Item, ...] = ()
    pieces: tuple[Piece, ...] = ()
    owners: frozenset[int] = frozenset()

    def add(self, unit: Sequence[Held]) -> None:
        for held in unit:
            # An empty tensor needs no place of its own; at 0 it is inside whatever the bucket's size.
            offset = aligned(self.nbytes) if held.nbytes else 0
            self.held.append((held, offset))
            if held.nbytes:
                self.nbytes = offset + held.nbytes

    def finish(self, piece_bytes: int) -> None:
        self.items = tuple(Item(h.tensor.name, h.tensor.dtype, h.tensor.shape, offset, h.nbytes) for h, offset in self.held)
        full = ((held, offset) for held, offset in self.held if held.nbytes)
        runs = groupby(full, key=lambda pair: pair[0].owner)
        self.pieces = tuple(piece for owner, run in runs for piece in _cut(owner, list(run), piece_bytes))
        self.owners = frozenset(piece.owner for piece in self.pieces)


def pack(units: list[list[Held]], fill_bytes: int) -> list[Draft]:
    """Buckets in the model's order, not cut into pieces yet (`Draft.finish`). One has no bytes only if no tensor has any.

    Fill buckets of `fill_bytes` with the units of each owner, in order, across layers.

    A unit that is larger, or of several owners, gets a bucket of its own. The bucket that is being filled stays open
    beside it until the layer ends: the small tensors around large ones then share a bucket, none far ahead of its layer.
    A bucket that is three quarters full is closed rather than topped up with tensors that are not its neighbours.
    """
    drafts: list[Draft] = []
    filling: dict[int, Draft] = {}
    empty: list[Held] = []  # tensors of no bytes before the first bucket
    newest: Draft | None = None
    for position, unit in enumerate(units):
        full = sorted((held for held in unit if held.nbytes), key=lambda held: held.owner)  # an owner's side by side
        nothing = [held for held in unit if not held.nbytes]
        if not full:  # needs nobody to bring it in: goes with its neighbour
            (newest.add(nothing) if newest else empty.extend(nothing))
            continue
        owner, layer = full[0].owner, layer_of(full[0].tensor.name)
        size = sum(aligned(held.nbytes) for held in full)
        alone = size > fill_bytes or full[-1].owner != owner
        current = filling.get(owner)
        if current and (
            (current.passed and current.layer != layer)
            or (current.last + 1 < position and 4 * current.nbytes >= 3 * fill_bytes and current.layer != layer)
        ):
            current = None
        if alone and current:
            current.passed = True
        if current is None or alone or aligned(current.nbytes) + size > fill_bytes:
            newest = Draft(position, owner, layer)
            drafts.append(newest)
            if not alone:
                filling[owner] = newest
        else:
            newest = current
        newest.last = position
        if newest.layers[-1:] != [layer]:
            newest.layers.append(layer)
        newest.add([*full, *nothing])
    if not drafts:
        drafts.append(Draft(0, empty[0].owner, ""))
    drafts[0].add(empty)
    return drafts


def _cut(owner: int, run: list[tuple[Held, int]], piece_bytes: int) -> list[Piece]:
    """Cut a run of one owner's tensors, (tensor, offset in the bucket), into pieces of nearly equal size.

    Pieces of a large tensor are lifted, and shared, while its next ones are still being lifted.
    """
    start, end = run[0][1], run[-1][1] + run[-1][0].nbytes
    count = -(-(end - start) // piece_bytes)
    size = aligned(-(-(end - start) // count))
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
