"""Whether a trace is what the Trace Event Format describes, by rules of the document itself and of Perfetto's importer."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from typing import Any

METADATA = {"process_name": "name", "thread_name": "name", "process_sort_index": "sort_index", "thread_sort_index": "sort_index"}
"""Metadata events that the format knows -> the argument that each must have."""


def check_chrome(data: bytes) -> list[dict[str, Any]]:
    """Its complete events. Raises AssertionError."""
    trace = json.loads(data, parse_constant=lambda word: math.nan)
    assert set(trace) <= {"traceEvents", "displayTimeUnit", "otherData"}, "other keys are taken for metadata"
    assert trace["displayTimeUnit"] in ("ms", "ns")
    named: dict[str, set[tuple[int, int]]] = defaultdict(set)
    threads: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    complete = []
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str) and isinstance(event["args"], dict)
        place = (event["pid"], event["tid"])
        assert all(type(number) is int and number > 0 for number in place), "0 is the idle process"
        if event["ph"] == "M":
            assert METADATA[event["name"]] in event["args"]
            named[event["name"]].add(place)
        elif event["ph"] == "X":
            assert isinstance(event["cat"], str) and event["cat"]
            assert all(type(event[key]) in (int, float) and math.isfinite(event[key]) for key in ("ts", "dur"))
            assert event["dur"] >= 0
            threads[place].append((event["ts"], event["ts"] + event["dur"]))
            complete.append(event)
        else:
            raise AssertionError(f"phase {event['ph']!r} is none of ours")
    assert {pid for pid, _ in threads} <= {pid for pid, _ in named["process_name"]}
    assert set(threads) <= named["thread_name"]
    assert len({tid for _, tid in threads}) == len(threads), "viewers tell threads apart by their number"
    for spans in threads.values():
        spans.sort()
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert end <= start + 1e-3, "complete events of a thread overlap"  # a nanosecond, of rounding
    return complete
