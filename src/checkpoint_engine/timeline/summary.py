"""What a trace says in a few lines: each stage's time at work, what overlapped it, its rate, and what bounds the update."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from checkpoint_engine.timeline.intervals import Interval, intersection, length, union
from checkpoint_engine.timeline.spans import STAGES, Span, Timeline, Trace

ALONE = 0.5
"""The part of an update for which a stage must be at work to be said to bound it."""


@dataclasses.dataclass(frozen=True, slots=True)
class StageSummary:
    """A stage on the rank that was longest at work in it.

    busy      seconds in which it was at work on at least one bucket
    alone     of them, seconds in which no other stage was at work on that rank
    overlap   other stage -> seconds in which both were at work there
    nbytes    that it moved there
    ceiling   bytes per second that the host can do at best; None: not known
    """

    stage: str
    rank: int
    busy: float
    alone: float
    overlap: dict[str, float]
    nbytes: int
    ceiling: float | None = None

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes per second at work; 0 where nothing moved."""
        return self.nbytes / self.busy / 1e9 if self.busy > 0 else 0.0

    @property
    def of_ceiling(self) -> float | None:
        return self.gb_per_s * 1e9 / self.ceiling if self.ceiling and self.nbytes else None


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """seconds: of the update, from its call. idle: the longest that a rank had no stage at work between its first and its last.
    merged: spans that stand for several, so that times at work, and overlaps, are upper bounds. bound: one sentence."""

    version: str
    method: str
    ranks: int
    nbytes: int
    seconds: float
    idle: float
    merged: int
    stages: tuple[StageSummary, ...]
    bound: str

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON, rates included."""
        stages = [{**dataclasses.asdict(s), "gb_per_s": s.gb_per_s, "of_ceiling": s.of_ceiling} for s in self.stages]
        return {**dataclasses.asdict(self), "stages": stages}


def summarise(trace: Trace, ceilings: Mapping[str, float] | None = None) -> Summary:
    """ceilings: stage -> bytes per second, and "peer_copy", which is what a share by copies is measured by."""
    ranks = {timeline.rank: _sets(timeline) for timeline in trace.ranks}
    stages = []
    for stage in _in_order({stage for sets in ranks.values() for stage in sets}):
        longest = max((t for t in trace.ranks if stage in ranks[t.rank]), key=lambda t: length(ranks[t.rank][stage]))
        stages.append(_stage(stage, longest, ranks[longest.rank], _ceiling(stage, trace, ceilings or {})))
    idle = max((_idle(sets.values()) for sets in ranks.values()), default=0.0)
    merged = sum(span.count > 1 for timeline in trace.ranks for span in timeline.spans)
    what = (trace.version, trace.method, len(trace.ranks), trace.nbytes, trace.seconds, idle, merged)
    return Summary(*what, tuple(stages), _bound(stages, trace.seconds, idle))


def _sets(timeline: Timeline) -> dict[str, list[Interval]]:
    by_stage: dict[str, list[Span]] = defaultdict(list)
    for span in timeline.spans:
        by_stage[span.stage].append(span)
    return {stage: union((s.start, s.end) for s in spans) for stage, spans in by_stage.items()}


def _in_order(stages: set[str]) -> list[str]:
    return [*(s for s in STAGES if s in stages), *sorted(stages - set(STAGES))]


def _stage(stage: str, timeline: Timeline, sets: Mapping[str, list[Interval]], ceiling: float | None) -> StageSummary:
    mine = sets[stage]
    others = {other: each for other, each in sets.items() if other != stage}
    overlap = {other: length(intersection(mine, others[other])) for other in _in_order(set(others))}
    busy = length(mine)
    alone = busy - length(intersection(mine, union(i for each in others.values() for i in each)))
    nbytes = sum(span.nbytes for span in timeline.spans if span.stage == stage)
    return StageSummary(stage, timeline.rank, busy, max(0.0, alone), overlap, nbytes, ceiling)


def _ceiling(stage: str, trace: Trace, ceilings: Mapping[str, float]) -> float | None:
    if stage != "share":
        return ceilings.get(stage)
    return {"copies": ceilings.get("peer_copy"), "broadcast": ceilings.get("share")}.get(trace.method)


def _idle(sets: Iterable[list[Interval]]) -> float:
    """From the first span to the last."""
    covered = union(i for each in sets for i in each)
    return covered[-1][1] - covered[0][0] - length(covered) if covered else 0.0


def _bound(stages: Sequence[StageSummary], seconds: float, idle: float) -> str:
    longest = max(stages, key=lambda s: s.busy, default=None)
    if longest is None or seconds <= 0:
        return "No stage was at work."
    part, alone = longest.busy / seconds, longest.alone / longest.busy if longest.busy else 0.0
    where = f"{longest.stage} on rank {longest.rank}"
    rate = "" if longest.of_ceiling is None else f", at {longest.of_ceiling:.0%} of its ceiling"
    work = f"at work for {part:.0%} of its {seconds:.3f} s, {alone:.0%} of that alone{rate}"
    if part >= ALONE:
        return f"{where} bounds the update: {work}."
    return f"No stage bounds the update by itself: the longest, {where}, was {work}; for {idle / seconds:.0%} none was at work."
