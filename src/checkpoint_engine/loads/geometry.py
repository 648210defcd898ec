"""Strided bytes: copies between two of them in their simplest form, and whether two of them share a byte. Pure."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

MAX_ROWS = 1 << 22
"""Rows of clashing extents that are compared one by one; beyond it they count as overlapping."""


class Shape(NamedTuple):
    """`run` adjacent bytes, once for every index of `sizes`; a and b: bytes between two of them on either side.

    Outer dimensions come first, in falling order of b. Sizes are all > 1; no dimensions: one run.
    """

    run: int
    sizes: tuple[int, ...]
    a: tuple[int, ...]
    b: tuple[int, ...]


@functools.lru_cache(maxsize=1024)  # a model of experts has thousands of tensors, and three or four shapes
def simplify(sizes: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], itemsize: int) -> Shape:
    """The same pairs of bytes in as few dimensions as possible. `sizes` in elements of `itemsize` bytes, none of them 0; strides
    `a` and `b` in bytes. The order of elements is lost: for copies it has no meaning."""
    dims = [(t, s, n) for n, s, t in zip(sizes, a, b, strict=True) if n != 1]
    if len(dims) > 1:
        dims.sort(reverse=True)
    run = itemsize
    while dims and dims[-1][0] == run == dims[-1][1]:
        run *= dims.pop()[2]
    merged: list[tuple[int, int, int]] = []
    for t, s, n in dims:
        while merged and merged[-1][0] == t * n and merged[-1][1] == s * n:
            n *= merged.pop()[2]
        merged.append((t, s, n))
    return Shape(run, tuple(n for _, _, n in merged), tuple(s for _, s, _ in merged), tuple(t for t, _, _ in merged))


def extent(run: int, sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Bytes from the first byte to behind the last one; strides are not negative."""
    return run + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))


class Bytes(NamedTuple):
    """A strided set of bytes: `run` at `offset`, and again at every index of `sizes`. owner: whose; any number."""

    owner: int
    offset: int
    run: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.offset + extent(self.run, self.sizes, self.strides)

    @property
    def rows(self) -> int:
        return math.prod(self.sizes)

    @property
    def nbytes(self) -> int:
        return self.run * self.rows

    def starts(self) -> torch.Tensor:
        """int64, one for each row."""
        return offsets(self.offset, self.sizes, self.strides).reshape(-1)


def offsets(first: int, sizes: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    """int64 of shape `sizes`: first + the sum of index x stride."""
    result = torch.full(tuple(sizes), first, dtype=torch.int64)
    for dim, (n, stride) in enumerate(zip(sizes, strides, strict=True)):
        result += (torch.arange(n, dtype=torch.int64) * stride).view(n, *(1 for _ in sizes[dim + 1 :]))
    return result


def overlapping(places: Iterable[Bytes]) -> set[tuple[int, int]]:
    """Pairs of owners (smaller first; an owner with itself too) whose bytes overlap, all in one storage.

    Of many owners that share the same bytes not every pair is named, but every owner is.
    """
    pairs: set[tuple[int, int]] = set()
    cluster: list[Bytes] = []
    end = 0
    for place in sorted(places, key=lambda p: p.offset):
        if cluster and place.offset >= end:
            _compare(cluster, pairs)
            cluster = []
        cluster.append(place)
        end = max(end, place.end) if len(cluster) > 1 else place.end
    _compare(cluster, pairs)
    return pairs


def _compare(cluster: list[Bytes], pairs: set[tuple[int, int]]) -> None:
    """All pairs of a cluster, whose extents touch one another, that share a byte."""
    if len(cluster) < 2:
        return
    if sum(place.rows for place in cluster) > MAX_ROWS:
        pairs.update(_pair(x.owner, y.owner) for x, y in itertools.pairwise(cluster))
        return
    starts = torch.cat([place.starts() for place in cluster])
    rows = torch.tensor([place.rows for place in cluster])
    ends = starts + torch.tensor([place.run for place in cluster]).repeat_interleave(rows)
    owners = torch.tensor([place.owner for place in cluster]).repeat_interleave(rows)
    order = starts.argsort(stable=True)
    starts, ends, owners = starts[order], ends[order], owners[order]
    reach, reached_by = ends.cummax(0)
    clash = (starts[1:] < reach[:-1]).nonzero().flatten()
    found = zip(owners[reached_by[clash]].tolist(), owners[clash + 1].tolist(), strict=True)
    pairs.update(_pair(x, y) for x, y in found)


def _pair(x: int, y: int) -> tuple[int, int]:
    return (x, y) if x <= y else (y, x)
