"""Where the bytes of a loader's own tensors came from, when all it did on the way was to move them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from checkpoint_engine.loads.geometry import offsets, simplify

MAX_GRANULES = 1 << 24
"""Granules (the largest pieces that were only moved as a whole) of a tensor that is followed; one of more is not. Each takes
8 bytes of host memory while a read of it is worked out."""
MAX_SEGMENTS = 4096
_SOURCE = 1 << 44  # a granule's origin: source x _SOURCE + granules from the source's start
_UNKNOWN = -1


class _TooMany(Exception):
    pass


class Segment(NamedTuple):
    """`run` bytes at every index of `sizes`, from `source` to some target; offsets and strides in bytes. source -1: unknown."""

    source: int
    source_offset: int
    offset: int
    run: int
    sizes: tuple[int, ...]
    source_strides: tuple[int, ...]
    strides: tuple[int, ...]


class Traced:
    """A storage that the loader made or keeps, `nbytes` long, and what was written there, in order.

    taint  sources that had a part in what is in it, and in what the loader decided by it
    """

    __slots__ = ("nbytes", "taint", "written")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.taint: set[int] = set()
        self.written: list[Segment] = []

    def read(
        self, offset: int, run: int, sizes: Sequence[int], strides: Sequence[int], targets: Sequence[int]
    ) -> list[Segment] | None:
        """Where the bytes at `offset` (runs, sizes, strides) came from; None if that is not known of all of them.

        The segments' targets are counted from 0, with the strides `targets`.
        """
        grain = math.gcd(run, offset, *strides)
        for w in self.written:
            grain = math.gcd(grain, w.offset, w.run, *w.strides, w.source_offset, *w.source_strides)
        if not self.written or self.nbytes // grain > MAX_GRANULES:
            return None
        seen = offsets(offset // grain, (*sizes, run // grain), (*(s // grain for s in strides), 1))
        if int(seen.max()) >= self.nbytes // grain:
            return None
        origins = self._origins(grain)[seen]
        if bool((origins < 0).any()):
            return None
        try:
            return self._segments(origins, grain, (*targets, grain))
        except _TooMany:
            return None

    def _origins(self, grain: int) -> torch.Tensor:
        """Of every granule."""
        origins = torch.full((self.nbytes // grain,), _UNKNOWN, dtype=torch.int64)
        for w in self.written:
            sizes = (*w.sizes, w.run // grain)
            there = offsets(w.offset // grain, sizes, (*(s // grain for s in w.strides), 1))
            if w.source < 0:
                origins[there] = _UNKNOWN
            else:
                first = w.source * _SOURCE + w.source_offset // grain
                origins[there] = offsets(first, sizes, (*(s // grain for s in w.source_strides), 1))
        return origins

    def _segments(self, origins: torch.Tensor, grain: int, targets: Sequence[int]) -> list[Segment]:
        segments: list[Segment] = []
        for start, part in _regular(origins, (0,) * origins.dim()):
            first = int(part[(0,) * part.dim()])
            steps = _steps(part)
            if len(segments) == MAX_SEGMENTS:
                raise _TooMany
            source, granule = divmod(first, _SOURCE)
            run, sizes, a, b = simplify(part.shape, tuple(s * grain for s in steps), tuple(targets), grain)
            offset = sum(i * t for i, t in zip(start, targets, strict=True))
            segments.append(Segment(source, granule * grain, offset, run, sizes, a, b))
        return segments


def _steps(part: torch.Tensor) -> list[int]:
    """Difference between the first two elements along every dimension; 0 where there is one."""
    zero = [0] * part.dim()
    first = int(part[tuple(zero)])
    steps = []
    for dim, n in enumerate(part.shape):
        zero[dim] = 1
        steps.append(int(part[tuple(zero)]) - first if n > 1 else 0)
        zero[dim] = 0
    return steps


def _regular(part: torch.Tensor, start: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """Cut `part` into boxes of one source and constant steps, none of them negative (no strides are). Yields where each starts,
    and its elements. Raises _TooMany."""
    steps = _steps(part)
    best, fewest, cut = -1, part.numel() + 1, part
    for dim, (n, step) in enumerate(zip(part.shape, steps, strict=True)):
        if n < 2:
            continue
        differ = part.diff(dim=dim) != step
        irregular = differ.movedim(dim, 0).reshape(n - 1, -1).any(1) | (not 0 <= step < _SOURCE // 2)
        if 0 < (count := int(irregular.sum())) < fewest:
            best, fewest, cut = dim, count, irregular
    if best < 0:
        yield start, part
        return
    if fewest > MAX_SEGMENTS:
        raise _TooMany
    dim, at = best, (cut.nonzero().flatten() + 1).tolist()
    for low, high in zip([0, *at], [*at, part.shape[dim]], strict=True):
        moved = (*start[:dim], start[dim] + low, *start[dim + 1 :])
        yield from _regular(part.narrow(dim, low, high - low), moved)
