"""Where the pieces that a rank reads stay in its host memory, so that it can be read from there: as they lie in their buckets."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from checkpoint_engine.manifest import TensorMeta
from checkpoint_engine.planning.packing import aligned
from checkpoint_engine.planning.plan import Piece, Plan


class Run(NamedTuple):
    """Neighbouring pieces of one owner: bytes [start, stop) of bucket number `bucket`, which begin at `place` in the memory."""

    bucket: int
    start: int
    stop: int
    place: int


def lay_out_runs(plan: Plan, rank: int) -> tuple[list[Run], int]:
    """The runs of `rank`, bucket after bucket, and the bytes of memory that they need."""
    runs: list[Run] = []
    end = 0
    for index, bucket in enumerate(plan.buckets):
        for owner, pieces in groupby(bucket.pieces, key=lambda piece: piece.owner):
            first, *rest = pieces
            if owner == rank:
                last = rest[-1] if rest else first
                runs.append(Run(index, first.offset, last.offset + last.nbytes, aligned(end)))
                end = aligned(end) + runs[-1].stop - first.offset
    return runs, end


def place_pieces(plan: Plan, rank: int, runs: Iterable[Run]) -> Iterator[tuple[Piece, int]]:
    """The rank's pieces in the order in which they are shared, and where each begins in the memory."""
    of_bucket: dict[int, list[Run]] = {}
    for run in runs:
        of_bucket.setdefault(run.bucket, []).append(run)
    for index, number in plan.stream:
        piece = plan.buckets[index].pieces[number]
        if piece.owner == rank:
            run = next(r for r in of_bucket[index] if r.start <= piece.offset < r.stop)
            yield piece, run.place + piece.offset - run.start


def held_tensors(
    plan: Plan, runs: Iterable[Run], reads: Iterable[TensorMeta], lost: Collection[tuple[int, int]] = ()
) -> tuple[TensorMeta, ...]:
    """Those of `reads` that the memory holds, by offset in it. lost: (offset, bytes) in it where nothing was written."""
    wanted = {tensor.name: tensor for tensor in reads}
    places = {name: 0 for name, tensor in wanted.items() if not tensor.nbytes}
    for run in runs:
        for item in plan.buckets[run.bucket].items:
            if item.name in wanted and item.nbytes and run.start <= item.offset < run.stop:
                place = run.place + item.offset - run.start
                if not any(begin < place + item.nbytes and place < begin + nbytes for begin, nbytes in lost):
                    places[item.name] = place
    held = (TensorMeta(t.name, t.dtype, t.shape, places[t.name], t.digest) for t in wanted.values() if t.name in places)
    return tuple(sorted(held, key=lambda t: (t.offset, t.nbytes)))
