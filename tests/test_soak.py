"""A short soak: the script of benchmarks/soak.py, which runs 1 000 updates, with fewer."""

from __future__ import annotations

import pytest
from benchmarks.soak import METHODS, RSS_BYTES, Measured, Point, Result, soak


@pytest.mark.timeout(240)
@pytest.mark.parametrize("method", ["mapped", "copies"])
def test_updates_in_a_row_leave_nothing_behind(method: str) -> None:
    result = soak(30, 2, 1, method)
    assert result.grown() == []
    assert result.failed_requests == 0
    assert result.answers[200] > 0
    assert result.method == {"mapped": "pull", "copies": "copies"}[method]
    assert [point.updates for point in result.points] == [1, *range(3, 31, 3)]


def _points(field: str, *values: int) -> list[Point]:
    nothing = Measured(0, 0, 0, 0, 0)
    return [Point(n, 0.0, {"server 0": nothing._replace(**{field: value})}) for n, value in enumerate(values)]


def test_what_counts_as_growth() -> None:
    assert sorted(METHODS) == ["broadcast", "copies", "mapped"]
    steady, leaking = [8, 9, 8, 9, 8, 9, 8, 9], [8, 10, 12, 14, 16, 18, 20, 22]
    for field in Measured._fields:
        unit = RSS_BYTES if field == "own_bytes" else 1
        assert Result(_points(field, *(v * unit for v in steady)), {200: 1}, "pull").grown() == []
        grown = Result(_points(field, *(v * unit for v in leaking)), {200: 1, 503: 2}, "pull")
        assert [line.split(":")[1].split()[0] for line in grown.grown()] == [field]
        assert grown.failed_requests == 2
