"""Timelines of real updates: what each rank recorded by each method, and what the trace of it says."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from checkpoint_engine import cli
from checkpoint_engine.server import UpdateReport
from checkpoint_engine.timeline import Timeline, from_chrome, summarise, to_chrome
from helpers.chrome import check_chrome
from helpers.fleet import Orders, Worker, request, server, share_of, tensors, workers
from helpers.ranks import run_ranks

RANKS = 2
KIB = 1 << 10
BYTES = sum(t.nbytes for t in tensors(1).values())
AROUND = {"join", "wait", "attach", "post_hook", "commit"}
SETTINGS: dict[str, dict[str, Any]] = {
    "copies": {},
    "broadcast": {"peer_copies": False},
    "mapped": {"map_regions": True},
}


def _update(rank: int, world_size: int, crew: list[Worker], changes: dict[str, Any], orders: Orders) -> Any:
    """The report of the second update, in which nothing is mapped for the first time; and this rank's bytes."""
    with server(bucket_bytes=64 * KIB, **changes) as ps:
        held = share_of(tensors(1), rank, world_size)
        ps.register_checkpoint("c", named_tensors=held)
        ps.gather_metas("c")
        for version in ("v1", "v2"):
            report = ps.update("c", request(crew[rank], rank, orders), version=version)
        return report, sum(t.nbytes for t in held.values())


def updated(changes: dict[str, Any], **orders: Any) -> tuple[list[UpdateReport], list[int]]:
    with workers(RANKS) as crew:
        results = run_ranks(_update, RANKS, crew, changes, Orders(**orders))
    return [report for report, _ in results], [nbytes for _, nbytes in results]


@functools.cache
def updated_by(method: str) -> tuple[list[UpdateReport], list[int]]:
    return updated(SETTINGS[method])


def moved(timeline: Timeline, stage: str) -> int:
    return sum(span.nbytes for span in timeline.spans if span.stage == stage)


def buckets(timeline: Timeline, stage: str) -> list[int]:
    return [span.bucket for span in timeline.spans if span.stage == stage]


def check(report: UpdateReport) -> None:
    """What holds of every timeline of an update that went well."""
    for rank, timeline in enumerate(report.timelines):
        assert timeline.rank == rank
        assert {span.stage for span in timeline.spans} >= AROUND - {"attach"}
        # Within the update, of which the origin is a part only; buckets are loaded in order, one after another.
        assert min(min(span.start, span.seconds) for span in timeline.spans) >= 0
        assert max(span.end for span in timeline.spans) <= report.seconds
        assert buckets(timeline, "load") == list(range(len(buckets(timeline, "load"))))
        assert moved(timeline, "load") == report.nbytes
        assert moved(timeline, "verify") == report.ranks[rank]["verify"].nbytes > 0
        ends = {span.stage: span.end for span in timeline.spans}
        starts = {span.stage: span.start for span in reversed(timeline.spans)}
        assert starts["wait"] == pytest.approx(ends["join"]) and starts["load"] >= ends["wait"]
        assert ends["load"] <= starts["post_hook"] <= ends["post_hook"] <= starts["commit"]
        loaded = {span.bucket: span.start for span in timeline.spans if span.stage == "load"}
        for span in timeline.spans:
            if span.stage in ("lift", "fetch", "verify"):  # a bucket is loaded when it is there, and is right
                assert span.end <= loaded[span.bucket]
    trace = report.trace
    read = from_chrome(data := to_chrome(trace))
    check_chrome(data)
    assert [len(t.spans) for t in read.ranks] == [len(t.spans) for t in report.timelines]
    before, after = summarise(trace), summarise(read)
    assert [(s.stage, s.nbytes) for s in before.stages] == [(s.stage, s.nbytes) for s in after.stages]
    assert before.bound == after.bound


@pytest.mark.parametrize("method", SETTINGS)
def test_each_rank_says_when_it_did_what(method: str) -> None:
    (report, other), held = updated_by(method)
    assert report.method == method
    assert other.timelines == ()  # rank 0 has them
    assert "timelines" not in report.to_dict() and "Span" not in repr(report)
    check(report)
    assert len(report.timelines) == RANKS
    for timeline, own in zip(report.timelines, held, strict=True):
        lifted, shared = moved(timeline, "lift"), moved(timeline, "share")
        if method == "mapped":
            assert (lifted, shared) == (0, 0)
            continue
        assert own <= lifted < 1.5 * own  # pieces are as long as their alignment makes them
        if method == "copies":
            assert shared == lifted  # to the only other rank
        else:
            assert shared == sum(moved(t, "lift") for t in report.timelines)
        seconds = sum(span.seconds for span in timeline.spans if span.stage == "lift")
        assert seconds == pytest.approx(report.ranks[timeline.rank]["lift"].seconds)
        assert sum(s.seconds for s in timeline.spans if s.stage == "share") == pytest.approx(
            report.ranks[timeline.rank]["share"].seconds
        )


def test_a_worker_that_comes_again() -> None:
    """Two passes have their own waits and commits; all stages come twice."""
    (report, _), _ = updated({}, passes=2)
    assert report.passes == 2
    for timeline in report.timelines:
        count = Counter(span.stage for span in timeline.spans)
        assert (count["join"], count["wait"], count["commit"], count["attach"]) == (1, 2, 2, 2)
        half = len(buckets(timeline, "load")) // 2
        assert buckets(timeline, "load") == [*range(half), *range(half)]


def test_timelines_that_are_switched_off() -> None:
    (report, _), _ = updated({"timelines": False})
    assert report.timelines == report.trace.ranks == ()
    assert report.stages["lift"].seconds > 0


def _one_is_off(rank: int, world_size: int, crew: list[Worker]) -> UpdateReport:
    report: UpdateReport = _update(rank, world_size, crew, {"timelines": rank == 1}, Orders())[0]
    return report


def test_ranks_need_not_agree_on_it() -> None:
    with workers(RANKS) as crew:
        report = run_ranks(_one_is_off, RANKS, crew)[0]
    assert [timeline.rank for timeline in report.timelines] == [1]


def _read_by_two(rank: int, world_size: int, crew: list[Worker]) -> UpdateReport | None:
    """Rank 0 holds everything; ranks 1 and 2 read it, each a half, and share that."""
    with server(bucket_bytes=64 * KIB, peer_transport="tcp") as ps:
        if rank == 0:
            ps.register_checkpoint("c", named_tensors=tensors(1))
        ps.gather_metas("c")
        report = None
        if rank > 0:

            def ask(handles: list[tuple[str, str]]) -> None:
                crew[rank - 1].update(handles[rank][1])

            report = ps.update("c", ask, ranks=[1, 2])
        ps.store_based_barrier()  # the source stays until it is read
        return report


def test_reads_from_peers() -> None:
    with workers(RANKS) as crew:
        _, report, other = run_ranks(_read_by_two, RANKS + 1, crew)
    assert report.method == "p2p (tcp)"
    assert other.timelines == ()
    check(report)
    assert sum(moved(timeline, "fetch") for timeline in report.timelines) == BYTES  # each byte once
    for timeline in report.timelines:
        assert moved(timeline, "fetch") == report.ranks[timeline.rank]["fetch"].nbytes > 0
        for stage in ("lift", "share"):
            assert set(buckets(timeline, stage)) == set(buckets(timeline, "fetch"))


# --- checkpoint-engine trace summary -----------------------------------------------------------------------------------


def test_summary_of_a_real_update(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (report, _), _ = updated_by("copies")
    file, ceilings = tmp_path / "t.json", tmp_path / "c.json"
    file.write_bytes(to_chrome(report.trace))
    common = {"host": "h", "device": "cpu", "names": ["cpu"], "torch": "2", "backend": "gloo", "memcpy": 8e9}
    ceilings.write_text(json.dumps(common))
    assert cli.run(["trace", "summary", str(file)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("v2 by copies: ") and " on 2 ranks in " in shown
    assert summarise(report.trace).bound in shown
    assert cli.run(["trace", "summary", str(file), "--ceilings", str(ceilings), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    stages = {stage["stage"]: stage for stage in told["stages"]}
    assert set(stages) >= AROUND | {"lift", "share", "load"}
    for stage in ("lift", "share", "load"):
        assert stages[stage]["ceiling"] == 8e9
        assert stages[stage]["of_ceiling"] == pytest.approx(stages[stage]["gb_per_s"] / 8)
    # Overlap as the intervals themselves have it.
    (timeline,) = (t for t in report.timelines if t.rank == stages["load"]["rank"])
    loads = [s for s in timeline.spans if s.stage == "load"]
    lifts = [s for s in timeline.spans if s.stage == "lift"]
    both = sum(max(0.0, min(a.end, b.end) - max(a.start, b.start)) for a in loads for b in lifts)
    assert stages["load"]["overlap"]["lift"] == pytest.approx(both, abs=1e-6)
    assert cli.run(["trace", "summary", str(ceilings)]) == 2
    assert "not a trace of an update" in capsys.readouterr().err
    assert cli.run(["trace", "summary", str(tmp_path / "none")]) == 2
    assert f"{tmp_path / 'none'}: No such file" in capsys.readouterr().err
