"""Arithmetic on sets of intervals. A set is a list of (start, end), disjoint and in order, as `union` makes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The set that any intervals cover together. Empty ones cover nothing."""
    covered: list[Interval] = []
    for start, end in sorted(i for i in intervals if i[0] < i[1]):
        if covered and start <= covered[-1][1]:
            covered[-1] = (covered[-1][0], max(covered[-1][1], end))
        else:
            covered.append((start, end))
    return covered


def intersection(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """What is in both sets."""
    common: list[Interval] = []
    i = j = 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            common.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return common


def length(intervals: Sequence[Interval]) -> float:
    """Of a set."""
    return sum(end - start for start, end in intervals)
