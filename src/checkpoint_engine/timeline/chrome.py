"""Traces in the Chrome trace event format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

A process is a rank, a thread a stage. Spans are complete events ("X") with `ts` and `dur` in microseconds. Events of one thread
must not overlap, or viewers draw them wrongly: a stage that is at work on several buckets at a time has several threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from checkpoint_engine.errors import NOT_DECODED, SettingsError
from checkpoint_engine.timeline.spans import STAGES, Span, Timeline, Trace

FIRST_PID = 1
"""Of rank 0: number 0 is the idle process to viewers."""

CLOCK = "each rank's own, from the moment at which it had heard that all ranks take part"


class _Args(msgspec.Struct):
    bucket: int
    nbytes: int
    count: int = 1


class _Complete(msgspec.Struct):
    """What is read of an event."""

    ph: str
    pid: int = 0
    cat: str = ""
    ts: float = 0.0
    dur: float = 0.0
    args: msgspec.Raw = msgspec.Raw(b"{}")


class _Rank(msgspec.Struct):
    pid: int
    rank: int
    host: str


class _About(msgspec.Struct):
    version: str
    method: str
    nbytes: int
    seconds: float
    ranks: list[_Rank]
    clock: str = CLOCK


class _File(msgspec.Struct):
    traceEvents: list[_Complete]
    otherData: _About


def to_chrome(trace: Trace) -> bytes:
    """A JSON object with `traceEvents`; what the update was is in its `otherData`."""
    ranks = [_Rank(FIRST_PID + timeline.rank, timeline.rank, timeline.host) for timeline in trace.ranks]
    about = _About(trace.version, trace.method, trace.nbytes, trace.seconds, ranks)
    events = [event for rank, timeline in zip(ranks, trace.ranks, strict=True) for event in _events(rank, timeline)]
    return msgspec.json.encode({"displayTimeUnit": "ms", "otherData": about, "traceEvents": events})


def _events(rank: _Rank, timeline: Timeline) -> Iterator[dict[str, Any]]:
    def named(kind: str, tid: int, **args: object) -> dict[str, Any]:
        return {"ph": "M", "name": kind, "pid": rank.pid, "tid": tid, "ts": 0, "args": args}

    first = 1000 * rank.pid  # viewers tell threads apart by number alone
    yield named("process_name", first, name=f"rank {rank.rank} ({rank.host})")
    yield named("process_sort_index", first, sort_index=rank.rank)
    tid = first
    stages = dict.fromkeys((*STAGES, *sorted({span.stage for span in timeline.spans})))
    for stage in stages:
        for number, track in enumerate(tracks([span for span in timeline.spans if span.stage == stage])):
            yield named("thread_name", tid, name=stage if number == 0 else f"{stage} {number + 1}")
            yield named("thread_sort_index", tid, sort_index=tid)
            for span, start, end in track:
                yield {
                    "ph": "X",
                    "name": stage if span.bucket < 0 else f"{stage} {span.bucket}",
                    "cat": stage,
                    "pid": rank.pid,
                    "tid": tid,
                    "ts": start / 1000,
                    "dur": (end - start) / 1000,
                    "args": {"bucket": span.bucket, "nbytes": span.nbytes, "count": span.count},
                }
            tid += 1


def tracks(spans: Sequence[Span]) -> list[list[tuple[Span, int, int]]]:
    """As few lists as can be, in none of which spans overlap: (span, its start and end in whole nanoseconds)."""
    made: list[list[tuple[Span, int, int]]] = []
    for span in sorted(spans, key=lambda s: s.start):
        start, end = round(span.start * 1e9), round(span.end * 1e9)
        track = next((t for t in made if t[-1][2] <= start), None)
        if track is None:
            made.append(track := [])
        track.append((span, start, max(start, end)))
    return made


def from_chrome(data: bytes) -> Trace:
    """What `to_chrome` wrote. Raises SettingsError when it is something else."""
    try:
        file = msgspec.json.decode(data, type=_File)
        spans: dict[int, list[Span]] = {rank.pid: [] for rank in file.otherData.ranks}
        for event in file.traceEvents:
            if event.ph == "X" and event.pid in spans:
                args = msgspec.json.decode(event.args, type=_Args)
                spans[event.pid].append(Span(event.cat, args.bucket, event.ts / 1e6, event.dur / 1e6, args.nbytes, args.count))
    except NOT_DECODED as e:
        raise SettingsError(f"not a trace of an update: {e}") from None
    about = file.otherData
    ranks = tuple(Timeline(r.rank, r.host, tuple(sorted(spans[r.pid], key=lambda s: (s.start, s.end)))) for r in about.ranks)
    return Trace(about.version, about.method, about.nbytes, about.seconds, ranks)
