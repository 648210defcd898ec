"""In which order pieces are shared, and where buckets lie meanwhile.

Sharing is in one order on all ranks, and an owner lifts only as far ahead of it as it has staging slots. So while one owner's
bucket came alone, a gigabyte of embedding say, all other ranks would idle. Its pieces therefore alternate with what the
other owners bring in next.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from itertools import islice

from checkpoint_engine.planning.packing import Draft, aligned
from checkpoint_engine.planning.plan import Bucket

AHEAD = 3
"""Layers by which other owners may be ahead, beside a large bucket, of the first layer that is not complete. That many
layers are half loaded then, and one more. Engines are slow with many; but one owner's part of a layer is more than a large
bucket in the largest models, and three layers hide most of a dense model's embedding."""

AHEAD_OF_SMALL = 1
"""The same beside any other bucket: enough where a layer's bytes are not evenly spread over its owners."""

OPEN = 2
"""Buckets in the ring that may be incomplete at a time: two owners alternate. A ring has room for three; one is being loaded."""

PASSED = 2
"""Large buckets without room that an owner may pass by: the large ones of no layer are at most an embedding and a head."""

NEAR = 32
"""Buckets among which those to go on with beside the first are looked for: bounds the planner's own time."""


def by_progress(drafts: Sequence[Draft]) -> list[Draft]:
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


class Interleaver:
    """Puts drafts, in their order, into a stream of pieces, and each where its memory is free by then.

    The first draft that is not complete is always the one to go on with. After each of its pieces the other owners go on
    with their own next drafts, as far as the window admits these: with about as many bytes each as the first draft's owner,
    or fewer if it has fewer left, so that who is ahead is caught up with by the end.

    Drafts up to `bucket_bytes` lie in the ring one after the other, in the order in which they begin. Large ones lie in an
    area behind it, wherever there is room: while a gigabyte of embedding comes in, matrices follow one another beside it.
    None begins before all that lay at its place are complete: so nothing in the stream ever waits for what comes later in it.
    """

    def __init__(self, drafts: Sequence[Draft], ring_bytes: int, bucket_bytes: int, ahead: tuple[int, int] | None) -> None:
        """ahead: layers, beside a large draft and beside any other; None: any number."""
        self._drafts, self._bucket_bytes = drafts, bucket_bytes
        self._window = _Window(drafts)
        self._ahead = ahead or (len(drafts), len(drafts))
        self._ring, self._area = _Ring(0, ring_bytes), _Area(ring_bytes, self._area_bytes())
        self.ring_bytes = ring_bytes + self._area.nbytes
        self._queues: dict[int, deque[Draft]] = defaultdict(deque)
        self._left: dict[int, int] = defaultdict(int)  # owner -> bytes it has not brought in
        for draft in drafts:
            self._queues[draft.owner].append(draft)
            for piece in draft.pieces:
                self._left[piece.owner] += piece.nbytes
        self._placed: dict[Draft, tuple[int, int]] = {}  # begun -> (offset, after)
        self._open: dict[Draft, int] = {}  # begun and not complete, in the order they began -> how many pieces have come
        self._index: dict[Draft, int] = {}  # complete -> its number
        self._room: dict[int, int] = defaultdict(int)  # owner -> bytes that it may bring in beside the first draft
        self._stream: list[tuple[Draft, int]] = []

    def run(self) -> tuple[tuple[Bucket, ...], tuple[tuple[int, int], ...]]:
        """(buckets, stream) of the plan."""
        for position, first in enumerate(self._drafts):
            while first not in self._index:
                # What lies at its place may be incomplete: that first, then.
                draft = first if self._begin(first) else next(iter(self._open))
                self._beside(draft, self._advance(draft), position)
        buckets = (
            Bucket(self._placed[draft][0], draft.nbytes, self._placed[draft][1], draft.items, draft.pieces)
            for draft in self._index
        )
        return tuple(buckets), tuple((self._index[draft], number) for draft, number in self._stream)

    def _large(self, draft: Draft) -> bool:
        return draft.nbytes > self._bucket_bytes

    def _area_bytes(self) -> int:
        """The largest, and beside it two of the third largest: while an embedding or a head travels, other owners go on with
        matrices that are large as well. At most two of the largest."""
        sizes = [*sorted((aligned(draft.nbytes) for draft in self._drafts if self._large(draft)), reverse=True), 0, 0, 0]
        return min(sizes[0] + 2 * sizes[2], 2 * sizes[0])

    def _begin(self, draft: Draft) -> bool:
        """Give it a place, unless it has one. False: there is none yet."""
        if draft not in self._placed:
            ring = self._area if self._large(draft) else self._ring
            if (placed := ring.place(draft, self._index)) is None:
                return False
            self._placed[draft], self._open[draft] = placed, 0
        return True

    def _advance(self, draft: Draft) -> int:
        """Stream its next piece, if it has any, and see whether it is complete. Returns the piece's bytes."""
        number, nbytes = self._open[draft], 0
        if number < len(draft.pieces):
            piece = draft.pieces[number]
            nbytes = piece.nbytes
            self._stream.append((draft, number))
            self._left[piece.owner] -= nbytes
            self._open[draft] = number = number + 1
        if number == len(draft.pieces):
            del self._open[draft]
            self._index[draft] = len(self._index)
            self._queues[draft.owner].remove(draft)
            self._window.leave(draft)
        return nbytes

    def _beside(self, first: Draft, nbytes: int, position: int) -> None:
        """Stream what other owners can lift while the owner of `first` lifts `nbytes`. position: of the first incomplete."""
        near = islice((draft for draft in islice(self._drafts, position, None) if draft not in self._index), NEAR)
        others = {draft.owner: None for draft in near if draft.owner not in first.owners}
        left = max(1, self._left[first.owner] + nbytes)
        for owner in others:  # who had to wait does not catch up at once: the first draft's owner would wait in its turn
            if (head := self._head(owner)) is not None:
                room = min(self._room[owner], self._next_bytes(head))
                self._room[owner] = room + min(nbytes, nbytes * self._left[owner] // left)
        ahead = self._ahead[0] if self._large(first) else self._ahead[1]
        while heads := [h for owner in others if (h := self._head(owner)) is not None and self._may_go_on(h, ahead)]:
            head = min(heads, key=lambda draft: draft.position)
            if self._begin(head):
                self._room[head.owner] -= self._advance(head)
            else:
                del others[head.owner]

    def _head(self, owner: int) -> Draft | None:
        """What `owner` goes on with: its next draft, past large ones for which there is no room yet, a head behind another
        rank's embedding say."""
        for draft in islice(self._queues[owner], 1 + PASSED):
            if draft in self._placed or not self._large(draft) or self._area.low(draft, self._index) is not None:
                return draft
        return None

    def _next_bytes(self, draft: Draft) -> int:
        return draft.pieces[self._open.get(draft, 0)].nbytes

    def _may_go_on(self, draft: Draft, ahead: int) -> bool:
        """Half of the next piece is enough: it is lifted by the time it is due, with a slot to spare."""
        if 2 * self._room[draft.owner] < self._next_bytes(draft):
            return False
        if draft in self._open:
            return True
        if self._large(draft):
            ahead = self._ahead[0]
        elif sum(not self._large(other) for other in self._open) >= OPEN:
            return False
        return len(draft.owners) == 1 and self._window.layers_ahead(draft) <= ahead


class _Window:
    """How far drafts are ahead of the first layer that is not complete. Tensors of no layer are modules of their own, and
    ahead of nothing."""

    def __init__(self, drafts: Sequence[Draft]) -> None:
        names = dict.fromkeys(layer for draft in sorted(drafts, key=lambda d: d.position) for layer in draft.layers if layer)
        self._number = {layer: number for number, layer in enumerate(names)}
        self._left = Counter(self._number[layer] for draft in drafts for layer in draft.layers if layer)
        self._first = 0

    def layers_ahead(self, draft: Draft) -> int:
        return max(0, next((self._number[layer] for layer in draft.layers if layer), 0) - self._first)

    def leave(self, draft: Draft) -> None:
        for layer in draft.layers:
            if layer:
                self._left[self._number[layer]] -= 1
        while self._first < len(self._number) and self._left[self._first] <= 0:
            self._first += 1


class _Ring:
    """`nbytes` of memory from `start` on, filled one bucket after the other; one that does not fit at the end starts at
    the beginning again. after: the last bucket that any so far had to wait for."""

    def __init__(self, start: int, nbytes: int) -> None:
        self._start, self.nbytes = start, nbytes
        self._head, self._after = 0, -1
        self._live: list[tuple[int, int, Draft]] = []  # (start, end)

    def low(self, draft: Draft, complete: dict[Draft, int]) -> int | None:
        """Where it would start; None when a draft that is not complete is in the way."""
        size = aligned(draft.nbytes)
        low = self._head if self._head + size <= self.nbytes else 0
        return None if any(other not in complete for other in self._over(low, size)) else low

    def _over(self, low: int, size: int) -> list[Draft]:
        return [other for start, end, other in self._live if start < low + size and low < end]

    def place(self, draft: Draft, complete: dict[Draft, int]) -> tuple[int, int] | None:
        """(offset, after), or None when a draft that is not complete is in the way."""
        if (low := self.low(draft, complete)) is None:
            return None
        size = aligned(draft.nbytes)
        over = self._over(low, size)
        self._after = max([self._after, *(complete[other] for other in over)])
        self._live = [entry for entry in self._live if entry[2] not in over]
        self._live.append((low, low + size, draft))
        self._head = low + size
        return self._start + low, self._after


class _Area:
    """`nbytes` of memory from `start` on, filled wherever what lay there was complete the longest time ago."""

    def __init__(self, start: int, nbytes: int) -> None:
        self._start, self.nbytes = start, nbytes
        self._used: list[tuple[int, int, Draft]] = []  # (start, end, who lay there last), apart from one another

    def low(self, draft: Draft, complete: dict[Draft, int]) -> int | None:
        """Where it would start; None when drafts that are not complete are in the way everywhere."""
        size = aligned(draft.nbytes)
        places = {low for low in (0, *(end for _, end, _ in self._used)) if low + size <= self.nbytes}
        free = [(self._after(low, size, complete), low) for low in places if self._free(low, size, complete)]
        return min(free)[1] if free else None

    def _over(self, low: int, size: int) -> list[Draft]:
        return [other for start, end, other in self._used if start < low + size and low < end]

    def _free(self, low: int, size: int, complete: dict[Draft, int]) -> bool:
        return all(other in complete for other in self._over(low, size))

    def _after(self, low: int, size: int, complete: dict[Draft, int]) -> int:
        return max((complete[other] for other in self._over(low, size)), default=-1)

    def place(self, draft: Draft, complete: dict[Draft, int]) -> tuple[int, int] | None:
        """(offset, after), or None as `low`."""
        if (low := self.low(draft, complete)) is None:
            return None
        high = low + aligned(draft.nbytes)
        after = self._after(low, high - low, complete)
        parts = [(part, other) for start, end, other in self._used for part in ((start, min(end, low)), (max(start, high), end))]
        self._used = [(start, end, other) for (start, end), other in parts if start < end]
        self._used.append((low, high, draft))
        return self._start + low, after
