"""Spans: one stage at work on one bucket; and how they are collected, and kept few."""

from __future__ import annotations

import collections
import itertools
import math
import time
from collections.abc import Iterable, Sequence

import msgspec

STAGES = ("join", "wait", "attach", "fetch", "lift", "share", "verify", "load", "copy", "plan", "post_hook", "commit")
"""In the order in which bytes, and an update, go through them.

join: ranks connect. wait: until the engines' workers have come. attach: a worker maps the shared memory. copy: the device is
still at what a load has queued. plan: a worker makes or proves its load plan."""

FLEET_SPANS, MOST_SPANS, LEAST_SPANS = 1 << 18, 1 << 12, 1 << 8


class Span(msgspec.Struct, frozen=True, array_like=True):
    """A stage at work.

    bucket   number in the stream; -1: it was at work on none
    start    seconds after the rank's origin
    nbytes   that the stage moved meanwhile; 0 where it moves none
    count    how many spans of neighbouring buckets it stands for, `bucket` being the first one's; see `coalesce`
    """

    stage: str
    bucket: int
    start: float
    seconds: float
    nbytes: int = 0
    count: int = 1

    @property
    def end(self) -> float:
        return self.start + self.seconds


class Timeline(msgspec.Struct, frozen=True):
    """One rank's spans in one update. rank: among those that are updated.

    Their origin is the moment at which this rank had heard that all ranks take part: clocks of several hosts are never compared,
    and the ranks' origins are apart by the time that a message takes.
    """

    rank: int
    host: str
    spans: tuple[Span, ...]


class Trace(msgspec.Struct, frozen=True):
    """One update. seconds, nbytes, method: as in UpdateReport; `seconds` began before the origin of the timelines."""

    version: str
    method: str
    nbytes: int
    seconds: float
    ranks: tuple[Timeline, ...]


def span_limit(world_size: int) -> int:
    """How many spans each rank may bring to the timeline of a pass, so that rank 0 gets 2^18 of them at most, some 10 MB."""
    return max(LEAST_SPANS, min(MOST_SPANS, FLEET_SPANS // world_size))


def coalesce(spans: Sequence[Span], limit: int) -> tuple[Span, ...]:
    """At most `limit` of them, or one for each stage, in order of time: neighbours of one stage become one span, those with the
    shortest pauses between them first. Pauses within a span count as work."""
    ordered = sorted(spans, key=lambda span: (span.start, span.end))
    if len(ordered) <= limit:
        return tuple(ordered)
    stages: dict[str, list[Span]] = collections.defaultdict(list)
    for span in ordered:
        stages[span.stage].append(span)
    pauses = sorted(
        (after.start - before.end, stage, number)
        for stage, each in stages.items()
        for number, (before, after) in enumerate(itertools.pairwise(each))
    )
    joined = {(stage, number) for _, stage, number in pauses[: len(ordered) - limit]}
    merged: list[Span] = []
    for stage, each in stages.items():
        run = [each[0]]
        for number, span in enumerate(each[1:]):
            if (stage, number) not in joined:
                merged.append(_merged(run))
                run = []
            run.append(span)
        merged.append(_merged(run))
    return tuple(sorted(merged, key=lambda span: (span.start, span.end)))


def _merged(run: Sequence[Span]) -> Span:
    first = run[0]
    if len(run) == 1:
        return first
    end = max(span.end for span in run)
    nbytes, count = sum(span.nbytes for span in run), sum(span.count for span in run)
    return Span(first.stage, first.bucket, first.start, end - first.start, nbytes, count)


class Recorder:
    """Collects spans of one rank, or of one worker. Threads may add at the same time. Times are of `time.perf_counter`.

    origin   of the spans that it gives
    limit    how many it gives at a time
    enabled  False: it keeps nothing
    """

    def __init__(self, origin: float = 0.0, limit: int = MOST_SPANS, *, enabled: bool = True) -> None:
        self._origin, self._limit, self.enabled = origin, limit, enabled
        self._spans: list[Span] = []
        self._lap = origin

    def lap(self, stage: str = "") -> None:
        """The whole rank was at `stage` since the last lap, or the origin; "": it was at several."""
        since, self._lap = self._lap, time.perf_counter()
        if stage:
            self.add(stage, -1, since, self._lap)

    def add(self, stage: str, bucket: int, since: float, until: float, nbytes: int = 0) -> None:
        if self.enabled:
            self._spans.append(Span(stage, bucket, since - self._origin, until - since, nbytes))

    def add_worker(self, spans: Iterable[Span], since: float, now: float, sizes: Sequence[int]) -> None:
        """What this rank's worker recorded with origin 0 between `since` and `now`; processes of a host read one clock. A worker
        in a time namespace of its own does not: its spans are moved so that the last one ends now. sizes: bytes of each bucket,
        which a load moves."""
        spans = [s for s in spans if math.isfinite(s.start) and math.isfinite(s.seconds)]
        if not self.enabled or not spans:
            return
        first, last = min(s.start for s in spans), max(s.end for s in spans)
        shift = now - last if first < since or last > now else 0.0
        for span in spans:
            loads = span.stage == "load" and 0 <= span.bucket < len(sizes)
            nbytes = sum(sizes[span.bucket : span.bucket + span.count]) if loads else span.nbytes
            start = span.start + shift - self._origin
            self._spans.append(Span(span.stage, span.bucket, start, span.seconds, nbytes, span.count))

    def take(self) -> tuple[Span, ...]:
        """Those so far; it begins anew."""
        spans, self._spans = self._spans, []
        return coalesce(spans, self._limit)
