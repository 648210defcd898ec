"""What needs no fleet: the record of updates, errors as data, ceilings, streams, the schema and what documents it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest
from fastapi import FastAPI
from pydantic import TypeAdapter

from checkpoint_engine.devices.probe import BroadcastRate, Ceilings
from checkpoint_engine.errors import CheckpointNotFoundError, EngineUnreachableError, SettingsError, UpdateError
from checkpoint_engine.http import examples
from checkpoint_engine.http import records as r
from checkpoint_engine.http.app import create_app
from checkpoint_engine.http.ceilings import read_ceilings
from checkpoint_engine.http.commands import Command, EngineSpec, Gather, Register, RollOut, Unregister
from checkpoint_engine.http.metrics import PREFIX
from checkpoint_engine.http.node import Node
from checkpoint_engine.http.problems import RankError, problem_of, status_of
from checkpoint_engine.http.pulse import Pulse
from checkpoint_engine.http.tracker import KEPT_TIMELINES, Tracker
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.server.report import StageReport, UpdateReport
from checkpoint_engine.server.watch import Ended, Moved, Started
from checkpoint_engine.timeline import Span, Timeline

ROOT = Path(__file__).parents[1]
REPORT = UpdateReport("v1", "broadcast", 100, 0.5, 1, {"load": StageReport(100, 0.2)}, ({"load": StageReport(100, 0.2)},))


@pytest.fixture
def app() -> Iterator[FastAPI]:
    with ParameterServer(rank=0, world_size=1) as ps, Node(ps) as node:
        yield create_app(node)


# --- the record of updates -----------------------------------------------------------------------------------------------


def failure(stage: str, dirty: bool) -> UpdateError:
    return UpdateError(rank=1, host="h", stage=stage, reason="no room", dirty=dirty)


def test_an_update_that_somebody_else_started() -> None:
    tracker = Tracker(0, lambda name: 100)
    tracker(Started("mine", None, rollout=False))
    tracker(Moved(40))
    running = tracker.running
    assert running is not None
    assert (running.state, running.nbytes, running.attempts, tracker.done) == ("updating", 100, 1, 40)
    tracker(Ended(REPORT, None, rollout=False))
    (record,) = tracker.updates()
    assert (record.id, record.state, record.version, record.report) == (running.id, "committed", "v1", REPORT.to_dict())
    assert (tracker.running, tracker.worker) == (None, ("v1", False))


def test_a_rollout_with_two_attempts_is_one_update() -> None:
    tracker = Tracker(0, lambda name: 100)
    begun = tracker.begin("mine", "v1")
    assert begun is not None and begun.state == "starting"
    assert tracker.begin("other", None) is None
    tracker(Started("mine", "v1", rollout=True))
    for error in (failure("load", dirty=True), None):
        tracker(Started("mine", "v1", rollout=False))
        tracker(Moved(100))
        tracker(Ended(None if error else REPORT, error, rollout=False))
        assert tracker.worker == ((None, True) if error else ("v1", False))
        assert tracker.running is not None
    tracker(Ended(REPORT, None, rollout=True))
    assert [(record.id, record.attempts, record.state) for record in tracker.updates()] == [(begun.id, 2, "committed")]


@pytest.mark.parametrize(("stage", "state"), [("load", "failed"), ("cancel", "cancelled")])
def test_an_update_that_fails(stage: str, state: str) -> None:
    tracker, ended = Tracker(0, lambda name: 0), list[r.UpdateRecord]()
    tracker.ended = ended.append
    tracker(Started("mine", "v1", rollout=False))
    tracker(Ended(None, failure(stage, dirty=False), rollout=False))
    (record,) = ended
    assert (record.state, tracker.worker) == (state, (None, None))
    assert record.error is not None
    assert record.error.names == {"rank": 1, "host": "h", "stage": stage, "dirty": False, "committed": False, "restored": None}
    tracker.fail(record.id, r.Problem("X", "too late", 0))
    assert tracker.updates() == [record]
    begun = tracker.begin("mine", None)  # and one that fails before its server was asked
    assert begun is not None
    tracker.fail(begun.id, r.Problem("X", "nobody came", 0))
    assert next(u.error and u.error.message for u in tracker.updates()) == "nobody came"


def test_only_the_last_updates_are_kept() -> None:
    tracker = Tracker(0, lambda name: 0, kept=3)
    for number in range(5):
        tracker(Started(f"c{number}", None, rollout=False))
        tracker(Ended(REPORT, None, rollout=False))
    assert [record.checkpoint for record in tracker.updates()] == ["c4", "c3", "c2"]
    assert len({record.id for record in tracker.updates()}) == 3


def test_timelines_of_the_last_updates_are_kept() -> None:
    tracker = Tracker(0, lambda name: 100)
    for number in range(KEPT_TIMELINES + 2):
        timeline = Timeline(0, "h", (Span("load", 0, float(number), 0.5, 100),))
        tracker(Started("mine", None, rollout=False))
        tracker(Ended(dataclasses.replace(REPORT, timelines=(timeline,)), None, rollout=False))
    tracker(Started("mine", None, rollout=False))
    tracker(Ended(REPORT, None, rollout=False))
    records = tracker.updates()
    assert [record.timeline for record in records] == [False, *[True] * KEPT_TIMELINES, False, False]
    traces = [tracker.trace(record.id) for record in records]
    assert [trace and trace.ranks[0].spans[0].start for trace in traces] == [None, *range(KEPT_TIMELINES + 1, 1, -1), None, None]


# --- errors, ceilings, messages ------------------------------------------------------------------------------------------


def test_errors_as_data() -> None:
    error = EngineUnreachableError("http://a", "refused")
    error.add_note("it stays paused")
    problem = problem_of(error, 3)
    assert problem == r.Problem("EngineUnreachableError", str(error), 3, {"endpoint": "http://a"}, ["it stays paused"])
    assert status_of(error) == 502
    assert problem_of(ValueError(), 0) == r.Problem("ValueError", "ValueError", 0)
    assert [status_of(e) for e in (ValueError(), SettingsError(), CheckpointNotFoundError("x"))] == [500, 400, 404]
    passed_on = RankError(problem, 502)
    assert (status_of(passed_on), problem_of(passed_on, 0)) == (502, problem)


def test_commands_survive_the_wire() -> None:
    engine = EngineSpec("vllm", "http://a", None, "token-of-the-engine")
    roll_out = RollOut("n", (engine,), None, "keep", False, "abort", 1.5, 600.0)
    for command in (Register("n", None, ("a", "b")), Unregister("n", True), Gather("n"), roll_out):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(command), type=Command) == command


def test_ceilings_of_each_stage(tmp_path: Path) -> None:
    common: dict[str, Any] = {"host": "h", "names": ("a", "b"), "torch": "2", "memcpy": 8e9}
    shared = (BroadcastRate(1 << 20, 1e9), BroadcastRate(1 << 26, 2e9))
    cuda = Ceilings(
        device="cuda", backend="nccl", h2d_together=(50e9, 40e9), device_copy=(2e12, 1e12), broadcast=shared, **common
    )
    file = tmp_path / "ceilings.json"
    file.write_bytes(cuda.to_json())
    assert read_ceilings(file) == {"lift": 40e9, "load": 1e12, "share": 2e9}
    file.write_bytes(msgspec.structs.replace(cuda, peer_copy=(3e11, 2e11)).to_json())
    assert read_ceilings(file)["peer_copy"] == 2e11
    file.write_bytes(Ceilings(device="cpu", backend="gloo", **common).to_json())
    assert read_ceilings(file) == {"lift": 8e9, "load": 8e9, "peer_copy": 8e9}
    for wrong in ('{"memcpy": "fast"}', '{"more": ' + "[" * 100_000):
        file.write_text(wrong)
        with pytest.raises(SettingsError, match="is not what `checkpoint-engine probe --json` prints"):
            read_ceilings(file)


def test_a_beat_from_a_thread_wakes_whoever_waits() -> None:
    async def main() -> tuple[int, int, int]:
        pulse = Pulse()
        pulse.bind()
        late = await pulse.wait(pulse.count, 0.01)
        thread = threading.Thread(target=pulse.beat)
        waiting = asyncio.ensure_future(pulse.wait(pulse.count, 20.0))
        thread.start()
        woken = await waiting
        thread.join()
        return late, woken, await pulse.wait(0, 20.0)  # a beat that was missed is heard at once

    assert asyncio.run(main()) == (0, 1, 1)


# --- the schema, and the pages that document it --------------------------------------------------------------------------


def test_every_route_is_in_the_schema_with_examples(app: FastAPI) -> None:
    """Of each body and each answer, good or bad; and every route that there is, but for rank 0's own."""
    schema = app.openapi()
    assert sum(len(of) for of in schema["paths"].values()) == 24
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            where = f"{method} {path}"
            assert operation.get("description"), where
            for status, answer in operation["responses"].items():
                assert answer["content"] and all("example" in content for content in answer["content"].values()), (where, status)
                if status >= "400":
                    assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/Failed"), (where, status)
            if body := operation.get("requestBody"):
                name = body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
                assert schema["components"]["schemas"][name]["examples"], name
    assert "https://" not in json.dumps(schema)


@pytest.mark.parametrize(
    ("example", "kind"),
    [
        (examples.PROBLEM, r.Problem),
        (examples.UPDATE, r.UpdateRecord),
        (examples.STARTED, r.UpdateRecord),
        (examples.CHECKPOINT, r.CheckpointView),
        (examples.DETAIL, r.CheckpointDetail),
        (examples.WEIGHTS, r.WeightsView),
        (examples.FLEET, r.FleetView),
        (examples.TIMELINE, r.TimelineView),
    ],
)
def test_examples_are_what_is_answered(example: Any, kind: Any) -> None:
    assert json.loads(msgspec.json.encode(msgspec.convert(example, kind))) == example
    assert set(example) == set(get_type_hints(kind))


def test_example_of_a_manifest_and_of_requests() -> None:
    from checkpoint_engine.http import schemas

    Manifest.from_json(json.dumps(examples.MANIFEST).encode())
    for body in (schemas.FilesBody, schemas.ContractUpdateBody, schemas.CheckpointBody, schemas.EngineBody, schemas.UpdateBody):
        shown: Any = body.model_config["json_schema_extra"]
        for example in shown["examples"]:
            TypeAdapter(body).validate_python(example)
    assert set(examples.UPDATE_REPORT) <= set(REPORT.to_dict())


def metric_names(app: FastAPI) -> set[str]:
    """Of all metrics that a server has, as they are documented: without the suffixes of a histogram's samples."""
    from fastapi.testclient import TestClient

    with TestClient(app, base_url="http://localhost") as client:
        page = client.get("/metrics").text
    return {name for name in re.findall(r"^# TYPE (\S+)", page, re.MULTILINE) if not name.endswith("_created")}


def test_metrics_are_documented_and_the_board_asks_for_no_other(app: FastAPI) -> None:
    names = metric_names(app)
    documented = set(re.findall(rf"^\| `({PREFIX}_\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))
    assert names - documented == set()
    later = {f"{PREFIX}_last_update_timestamp_seconds"}  # there after the first update
    assert documented - names == later
    board = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    assert len(asked) >= 8
    for expression in asked:
        found = re.findall(rf"{PREFIX}_\w+", expression)
        assert found
        assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in found} <= documented, expression


def test_dashboard_loads_nothing_from_elsewhere(app: FastAPI) -> None:
    from fastapi.testclient import TestClient

    with TestClient(app, base_url="http://localhost") as client:
        answer = client.get("/")
    assert answer.status_code == 200
    assert re.findall(r"(?:src|href)=\"(?!#)[^\"]*\"|@import|url\(|innerHTML|eval\(", answer.text) == []
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_answers_are_sent_at_once() -> None:
    """Connections to a listener of ours do not wait for acknowledgements (Nagle), which would take 40 ms."""
    import socket

    from checkpoint_engine.engines.embedded.serve import bind

    listener, _ = bind("127.0.0.1", 0, None)
    with listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
