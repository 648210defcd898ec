"""Timelines as data: sets of intervals, few spans out of many, Chrome's trace format, and what a summary says."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections import Counter
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.devices.cpu import CpuStream
from checkpoint_engine.devices.spans import Spans
from checkpoint_engine.errors import SettingsError
from checkpoint_engine.timeline import Recorder, Span, Timeline, Trace, coalesce, from_chrome, span_limit, summarise, to_chrome
from checkpoint_engine.timeline.chrome import tracks
from checkpoint_engine.timeline.intervals import intersection, length, union
from checkpoint_engine.worker.work import Work
from helpers.chrome import check_chrome

unhurried = settings(deadline=None)
# Whole numbers: sets of points are the model.
intervals = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12)
ticks = st.integers(0, 10_000_000).map(lambda ns: ns / 1e9)
spans = st.builds(
    Span,
    stage=st.sampled_from(["lift", "share", "load", "anything else"]),
    bucket=st.integers(-1, 500),
    start=ticks,
    seconds=ticks,
    nbytes=st.integers(0, 1 << 40),
)
timelines = st.lists(st.lists(spans, max_size=20), max_size=4).map(
    lambda ranks: tuple(Timeline(rank, f"host-{rank}", tuple(each)) for rank, each in enumerate(ranks))
)


def points(of: list[tuple[int, int]]) -> set[int]:
    return {point for start, end in of for point in range(start, end)}


@unhurried
@given(intervals, intervals)
def test_sets_of_intervals_are_sets_of_points(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    a, b = union(first), union(second)
    assert points(a) == points(first)  # type: ignore[arg-type]
    assert all(before[1] < after[0] for before, after in itertools.pairwise(a))  # disjoint, in order, as few as can be
    assert all(start < end for start, end in a)
    assert length(a) == len(points(first))
    assert points(intersection(a, b)) == points(first) & points(second)  # type: ignore[arg-type]
    assert length(a) + length(b) == length(union([*a, *b])) + length(intersection(a, b))


# --- few spans out of many ----------------------------------------------------------------------------------------------


@unhurried
@given(st.lists(spans, max_size=60), st.integers(1, 40))
def test_coalesced_spans(many: list[Span], limit: int) -> None:
    few = coalesce(many, limit)
    assert len(few) <= max(limit, len({span.stage for span in many}))
    assert len(few) == len(many) or len(many) > limit
    assert [span.start for span in few] == sorted(span.start for span in few)
    for stage in {span.stage for span in many}:
        mine, theirs = [s for s in many if s.stage == stage], [s for s in few if s.stage == stage]
        assert sum(s.count for s in theirs) == len(mine)
        assert sum(s.nbytes for s in theirs) == sum(s.nbytes for s in mine)
        work, covered = union((s.start, s.end) for s in mine), union((s.start, s.end) for s in theirs)
        # Nothing is left out (but for the rounding of end - start), and only pauses are taken in.
        assert length(intersection(work, covered)) == pytest.approx(length(work), abs=1e-12)
        if theirs:
            assert theirs[0].start == min(s.start for s in mine)
            assert max(s.end for s in theirs) == pytest.approx(max(s.end for s in mine))


def test_the_shortest_pauses_are_closed() -> None:
    starts = [0.0, 1.0, 2.1, 3.3, 7.0]
    few = coalesce([Span("load", number, start, 0.9, 10) for number, start in enumerate(starts)], 3)
    assert [(s.bucket, s.count, s.nbytes) for s in few] == [(0, 3, 30), (3, 1, 10), (4, 1, 10)]
    assert few[0].end == pytest.approx(3.0)


def test_limits_of_small_and_large_fleets() -> None:
    assert [span_limit(size) for size in (1, 64, 256, 1024, 10_000)] == [4096, 4096, 1024, 256, 256]


def test_recorders_of_many_threads_lose_nothing() -> None:
    recorder = Recorder(limit=10_000)

    def add(stage: str) -> None:
        for bucket in range(500):
            recorder.add(stage, bucket, 1.0, 2.0)

    threads = [threading.Thread(target=add, args=(stage,)) for stage in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(span.stage for span in recorder.take()) == dict.fromkeys("abcd", 500)
    assert recorder.take() == ()


def test_a_recorder_that_is_off_keeps_nothing() -> None:
    recorder = Recorder(enabled=False)
    recorder.add("load", 0, 1.0, 2.0)
    recorder.lap("wait")
    recorder.add_worker((Span("load", 0, 1.0, 1.0),), 0.0, 3.0, [1])
    assert recorder.take() == ()


def test_what_a_worker_recorded() -> None:
    """Its loads get their buckets' bytes. One with another clock, or with numbers that are none, harms nobody."""
    recorder = Recorder(origin=100.0)
    recorder.add_worker((Span("attach", -1, 101.0, 0.5), Span("load", 1, 102.0, 1.0)), 100.5, 104.0, [10, 20])
    assert recorder.take() == (Span("attach", -1, 1.0, 0.5), Span("load", 1, 2.0, 1.0, 20))
    recorder.add_worker((Span("load", 0, 7.0, 1.0, count=2), Span("load", 5, 8.0, 1.0)), 100.5, 104.0, [10, 20])
    assert recorder.take() == (Span("load", 0, 2.0, 1.0, 30, 2), Span("load", 5, 3.0, 1.0))
    recorder.add_worker((Span("load", 0, math.nan, 1.0), Span("load", 0, 102.0, math.inf)), 100.5, 104.0, [10])
    assert recorder.take() == ()


def test_streams_say_when_their_work_was_done() -> None:
    """A second pass begins anew; without a clock only seconds are counted."""
    with CpuStream("lift") as stream:
        spans = Spans()
        for clock in (stream.clock(), None):
            spans.begin(clock)
            before = time.perf_counter()
            for _ in range(3):
                since = stream.record()
                stream.call(lambda: time.sleep(0.001))
                spans.add(stream, since, stream.record())
            assert stream.record().wait(20)
            after = time.perf_counter()
            seconds, times = spans.take()
            assert 0.003 <= seconds <= after - before
            assert len(times) == (3 if clock else 0)
            for start, end in times:
                assert before <= start <= end <= after
            assert [start for start, _ in times] == sorted(start for start, _ in times)
        assert spans.take() == (0.0, [])
        spans.add(stream, stream.record(), stream.record())  # of a pass that failed
        spans.begin(None)
        assert stream.record().wait(20)
        assert spans.take() == (0.0, [])


def test_a_worker_whose_device_is_behind() -> None:
    """What a load has queued is over later; it is only one bucket's turn at a time."""
    work = Work(SimpleNamespace(kind="cuda"))  # type: ignore[arg-type]
    start = time.perf_counter()
    queued = [start + work.did("load", start, bucket) for bucket in range(2)]
    for bucket, since in enumerate(queued):
        work.copied(bucket, since)
    work.did("plan", time.perf_counter())  # there was none to speak of
    seconds, spans, verified = work.take()
    by_stage = {stage: [s for s in spans if s.stage == stage] for stage in ("load", "copy", "plan")}
    assert [s.bucket for s in by_stage["load"]] == [s.bucket for s in by_stage["copy"]] == [0, 1]
    first, second = by_stage["copy"]
    assert first.start == pytest.approx(queued[0], abs=1e-9) and second.start == pytest.approx(first.end, abs=1e-9)
    assert by_stage["plan"] == [] and seconds["worker"] >= sum(s.seconds for s in by_stage["load"])
    assert verified == 0
    work.checks(3, 1.0, 2.0, 100)
    work.checked, work.checking = 100, 1.0
    assert work.take() == ({"worker": 0.0, "verify": 1.0}, (Span("verify", 3, 1.0, 1.0, 100),), 100)
    assert work.take() == ({"worker": 0.0}, (), 0)


# --- Chrome's format ----------------------------------------------------------------------------------------------------


@unhurried
@given(timelines)
def test_traces_are_read_as_they_were_written(ranks: tuple[Timeline, ...]) -> None:
    trace = Trace("v1", "copies", 123, 0.5, ranks)
    data = to_chrome(trace)
    events = check_chrome(data)
    assert len(events) == sum(len(timeline.spans) for timeline in ranks)
    read = from_chrome(data)
    assert (read.version, read.method, read.nbytes, read.seconds) == ("v1", "copies", 123, 0.5)

    def described(of: tuple[Timeline, ...]) -> list[object]:
        key = [(s.stage, s.bucket, round(s.start * 1e9), round(s.seconds * 1e9), s.nbytes, s.count) for t in of for s in t.spans]
        return [[(t.rank, t.host, len(t.spans)) for t in of], sorted(key)]

    assert described(read.ranks) == described(ranks)


def test_overlapping_spans_of_a_stage_go_to_several_threads() -> None:
    read = [Span("fetch", number, start, 1.0) for number, start in enumerate([0.0, 0.5, 1.0, 1.2, 1.5])]
    assert [[span.bucket for span, _, _ in track] for track in tracks(read)] == [[0, 2], [1, 4], [3]]
    events = json.loads(to_chrome(Trace("v", "m", 0, 1.0, (Timeline(3, "h", tuple(read)),))))["traceEvents"]
    names = [e["args"]["name"] for e in events if e["name"] in ("process_name", "thread_name")]
    assert names == ["rank 3 (h)", "fetch", "fetch 2", "fetch 3"]


@pytest.mark.parametrize("data", [b"", b"[]", b'{"traceEvents": []}', b"\x80", b'{"traceEvents": 1, "otherData": {}}'])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(SettingsError, match="not a trace of an update"):
        from_chrome(data)


def test_an_event_without_its_arguments_is_refused() -> None:
    trace = json.loads(to_chrome(Trace("v", "m", 0, 1.0, (Timeline(0, "h", (Span("load", 0, 0.0, 1.0),)),))))
    trace["traceEvents"][-1]["args"] = {}
    with pytest.raises(SettingsError, match="not a trace of an update"):
        from_chrome(json.dumps(trace).encode())


# --- summaries ----------------------------------------------------------------------------------------------------------


@unhurried
@given(timelines)
def test_summaries_add_up(ranks: tuple[Timeline, ...]) -> None:
    found = summarise(Trace("v1", "copies", 123, 0.05, ranks), {"lift": 1e9})
    assert {s.stage for s in found.stages} == {span.stage for timeline in ranks for span in timeline.spans}
    for stage in found.stages:
        assert 0 <= stage.alone <= stage.busy + 1e-12
        assert all(0 <= seconds <= stage.busy + 1e-12 for seconds in stage.overlap.values())
        assert stage.alone + sum(stage.overlap.values()) >= stage.busy - 1e-9  # the rest is shared with some other stage
        assert (stage.of_ceiling is None) == (stage.stage != "lift" or stage.nbytes == 0)
    assert msgspec.json.decode(msgspec.json.encode(found.to_dict()))["bound"] == found.bound
    assert found.bound.endswith(".") and "\n" not in found.bound


def _trace(method: str, *spans: Span, seconds: float = 1.0) -> Trace:
    quiet = Timeline(0, "h", (Span("lift", 0, 0.0, 0.01, 10),))
    return Trace("v1", method, 1000, seconds, (quiet, Timeline(1, "h", spans)))


def test_what_bounds_an_update() -> None:
    trace = _trace("copies", Span("lift", 0, 0.0, 0.4, 400), Span("share", 0, 0.2, 0.4, 800), Span("load", 0, 0.3, 0.65, 1000))
    found = summarise(trace, {"lift": 2000.0, "share": 1.0, "peer_copy": 4000.0, "load": 2000.0})
    by_stage = {s.stage: s for s in found.stages}
    assert list(by_stage) == ["lift", "share", "load"]  # as bytes go through them
    load = by_stage["load"]
    assert (load.rank, load.nbytes) == (1, 1000)
    assert (load.busy, load.alone) == (pytest.approx(0.65), pytest.approx(0.35))
    assert load.overlap == {"lift": pytest.approx(0.1), "share": pytest.approx(0.3)}
    assert by_stage["share"].of_ceiling == pytest.approx(0.5)  # copies are measured by copies
    assert found.idle == 0
    assert found.bound == (
        "load on rank 1 bounds the update: at work for 65% of its 1.000 s, 54% of that alone, at 77% of its ceiling."
    )


def test_an_update_that_nothing_bounds() -> None:
    found = summarise(_trace("p2p (tcp)", Span("wait", -1, 0.0, 0.25), Span("load", 0, 0.75, 0.2, 1000)), {"share": 1.0})
    assert found.idle == pytest.approx(0.5)
    assert found.bound == (
        "No stage bounds the update by itself: the longest, wait on rank 1, was at work for 25% of its 1.000 s, 100% of that "
        "alone; for 50% none was at work."
    )
    assert summarise(Trace("v", "none", 0, 0.0, ())).bound == "No stage was at work."


def test_broadcasts_are_measured_by_broadcasts_and_reads_by_nothing() -> None:
    ceilings = {"share": 100.0, "peer_copy": 1.0}
    of_share = {
        method: summarise(_trace(method, Span("share", 0, 0.0, 0.5, 25)), ceilings).stages[-1].of_ceiling
        for method in ("broadcast", "copies", "p2p (shm)")
    }
    assert of_share == {"broadcast": pytest.approx(0.5), "copies": pytest.approx(50.0), "p2p (shm)": None}
