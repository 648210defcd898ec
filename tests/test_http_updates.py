"""REST of a real fleet that updates real engines: register, inspect, start, follow, cancel, fail, heal, count."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file

from checkpoint_engine.manifest import Manifest
from helpers.engines import engine_processes
from helpers.prometheus import lint
from helpers.rest import Served, engine_bodies, events, follow, gated, model_dir, serving, until, wait_until_met
from helpers.tools import tool

RANKS = 2
SPOILT = "encoder.layer.1.output.dense.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_dir(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def engines(model: Path) -> Iterator[list[str]]:
    with engine_processes(model, [[]] * RANKS) as urls:
        yield urls


@pytest.fixture(scope="module")
def fleet() -> Iterator[Served]:
    with serving(RANKS, env={"CHECKPOINT_ENGINE_BUCKET_BYTES": "4096"}) as served:
        yield served


@pytest.fixture(scope="module")
def rest(fleet: Served, model: Path) -> Iterator[httpx.Client]:
    """With the checkpoint "first" on both ranks."""
    with fleet.client() as client:
        wait_until_met(client, RANKS)
        made = client.post("/v1/checkpoints", json={"name": "first", "directory": str(model)})
        assert made.status_code == 201, made.text
        yield client


def start(rest: httpx.Client, urls: list[str], **body: Any) -> Any:
    answer = rest.post("/v1/updates", json={"checkpoint": "first", "engines": engine_bodies(urls), **body})
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/updates/{answer.json()['id']}"
    return answer.json()


def error(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["type"]


def test_checkpoints_on_all_ranks(rest: httpx.Client, model: Path) -> None:
    (listed,) = rest.get("/v1/checkpoints").json()
    tensors = load_file(model / "model.safetensors")
    assert (listed["name"], listed["tensors"]) == ("first", len(tensors))
    assert [part["rank"] for part in listed["parts"]] == [0, 1]
    assert all(part["tensors"] for part in listed["parts"])
    detail = rest.get("/v1/checkpoints/first", params={"contains": "layer.1", "offset": 2, "limit": 3}).json()
    names = sorted(name for name in tensors if "layer.1" in name)
    assert [t["name"] for t in detail["tensors"]] == names[2:5]
    assert detail["listed"] == len(names)
    manifest = Manifest.from_json(rest.get("/v1/manifest", params={"checkpoint": "first"}).content)
    assert manifest.version == listed["version"]
    assert manifest.nbytes == sum(t.nbytes for t in tensors.values())


def test_registering_is_for_all_ranks_or_none(fleet: Served, rest: httpx.Client, model: Path, tmp_path: Path) -> None:
    assert error(rest.post("/v1/checkpoints", json={"name": "first", "directory": str(model)})) == (409, "CheckpointExistsError")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\0" * 100)
    answer = rest.post("/v1/checkpoints", json={"name": "bad", "files": [str(bad)]})
    assert error(answer) == (400, "FileFormatError")
    assert answer.json()["error"]["names"]["file"] == str(bad)
    assert error(rest.post("/v1/checkpoints", json={"name": "none", "directory": str(tmp_path / "no")})) == (
        400,
        "CheckpointError",
    )
    assert [c["name"] for c in rest.get("/v1/checkpoints").json()] == ["first"]
    assert rest.post("/v1/checkpoints", json={"name": "second", "directory": str(model)}).status_code == 201
    assert rest.delete("/v1/checkpoints/second", params={"fleet": True}).status_code == 200
    assert [c["name"] for c in rest.get("/v1/checkpoints").json()] == ["first"]
    assert error(rest.delete("/v1/checkpoints/second")) == (404, "CheckpointNotFoundError")


def test_an_update_followed_to_its_end(rest: httpx.Client, engines: list[str]) -> None:
    begun = start(rest, engines, pause="keep", version="v1", verify="off")
    with rest.stream("GET", f"/v1/updates/{begun['id']}/events") as stream:
        seen = [record for kind, record in events(stream) if kind == "update"]
    record = seen[-1]
    assert record["state"] == "committed", record
    assert record == rest.get(f"/v1/updates/{begun['id']}").json() == rest.get("/v1/updates").json()[0]
    assert [r["state"] for r in seen[:-1]] == sorted(r["state"] for r in seen[:-1])  # starting, then updating
    assert record["version"] == record["report"]["version"] == "v1"
    assert record["report"]["pause_ms"] > 0
    assert [set(stages) >= {"lift", "share", "load"} for stages in record["report"]["ranks"]] == [True] * RANKS
    assert "verify" not in record["report"]["stages"]
    weights = rest.get("/v1/weights").json()
    assert weights["engines"] == [{"endpoint": u, "version": "v1", "dirty": False, "error": None} for u in engines]
    assert weights["workers"] == [{"rank": r, "version": "v1", "dirty": False} for r in range(RANKS)]


def test_while_an_update_runs(rest: httpx.Client, engines: list[str]) -> None:
    """The server answers everything meanwhile; what would disturb it is refused. Then it goes on."""
    with gated(engines[1]) as (front, asked, may):
        begun = start(rest, [engines[0], front], version="v2")
        assert asked.wait(20)
        assert rest.get("/v1/healthz").json() == {"status": "ok", "rank": 0}
        running = rest.get("/v1/fleet").json()["running"]
        assert (running["id"], running["state"], len(running["done"])) == (begun["id"], "updating", RANKS)
        assert running["nbytes"] > 0
        assert rest.get(f"/v1/updates/{begun['id']}").json()["state"] == "updating"
        assert error(rest.post("/v1/updates", json={"checkpoint": "first", "engines": engine_bodies(engines)})) == (
            409,
            "UpdateInProgressError",
        )
        assert error(rest.delete("/v1/checkpoints/first")) == (409, "CheckpointBusyError")
        assert "checkpoint_engine_update_running 1.0" in rest.get("/metrics").text
        may.set()
        assert follow(rest, begun["id"])["state"] == "committed"


@pytest.mark.parametrize("policy", ["abort", "continue"])
def test_cancel(rest: httpx.Client, engines: list[str], policy: str) -> None:
    """Ends on all ranks, is not tried again without anybody, and spoils nothing for the next update."""
    with gated(engines[1]) as (front, asked, may):
        begun = start(rest, [engines[0], front], on_replica_failure=policy)
        assert asked.wait(20)
        assert rest.delete(f"/v1/updates/{begun['id']}").status_code == 202
        record = follow(rest, begun["id"])
        may.set()
    assert (record["state"], record["attempts"]) == ("cancelled", 1)
    names = record["error"]["names"]
    assert names == names | {"rank": 0, "stage": "cancel", "dirty": False, "committed": False, "restored": None}
    assert rest.delete(f"/v1/updates/{begun['id']}").json()["state"] == "cancelled"
    begun = start(rest, engines, version=f"after-{policy}")
    assert follow(rest, begun["id"])["state"] == "committed"


def test_failure_names_what_failed_and_is_healed(rest: httpx.Client, engines: list[str], model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, SPOILT: torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    assert rest.post("/v1/checkpoints", json={"name": "spoilt", "directory": str(tmp_path)}).status_code == 201
    record = follow(rest, start(rest, engines, checkpoint="spoilt")["id"])
    assert (record["state"], record["error"]["type"], record["error"]["names"]["stage"]) == ("failed", "UpdateError", "load")
    assert SPOILT in record["error"]["message"]
    assert [engine["dirty"] for engine in rest.get("/v1/weights").json()["engines"]] == [True] * RANKS
    record = follow(rest, start(rest, engines, checkpoint="spoilt", on_failure="restore")["id"])
    assert record["state"] == "failed"
    served = record["error"]["names"]["restored"]
    assert record["error"]["message"].endswith(f"; {served!r} was restored")

    def whole(data: Any) -> bool:
        return isinstance(data, dict) and all(rank["state"]["dirty"] is False for rank in data["ranks"])

    until(rest, "/v1/events", whole)  # rank 1 resumes its own engine, after rank 0 has ended
    weights = rest.get("/v1/weights").json()
    assert [(engine["version"], engine["dirty"]) for engine in weights["engines"]] == [(served, False)] * RANKS
    assert follow(rest, start(rest, engines, checkpoint="spoilt")["id"])["state"] == "failed"
    assert rest.delete("/v1/checkpoints/spoilt", params={"fleet": True, "force": True}).status_code == 200
    assert [worker["dirty"] for worker in rest.get("/v1/weights").json()["workers"]] == [True] * RANKS
    assert follow(rest, start(rest, engines, version="healed")["id"])["state"] == "committed"
    assert rest.get("/v1/weights").json()["workers"][1] == {"rank": 1, "version": "healed", "dirty": False}


def test_what_the_caller_did_wrong(rest: httpx.Client, engines: list[str]) -> None:
    engine = engine_bodies(engines)
    assert error(rest.post("/v1/updates", json={"checkpoint": "none", "engines": engine})) == (404, "CheckpointNotFoundError")
    assert error(rest.post("/v1/updates", json={"checkpoint": "first"})) == (400, "SettingsError")
    invalid = rest.post(
        "/v1/updates", json={"checkpoint": "first", "engines": [{"url": 3, "token": "hidden-secret"}], "pause": "x"}
    )
    assert error(invalid) == (422, "RequestValidationError")
    assert "hidden-secret" not in invalid.text
    for engines_of in ([{"kind": "sglang", "url": "no url"}] * RANKS, engine_bodies([*engines, engines[0]])):
        record = follow(rest, rest.post("/v1/updates", json={"checkpoint": "first", "engines": engines_of}).json()["id"])
        assert (record["state"], record["error"]["type"]) == ("failed", "SettingsError")
    assert error(rest.get("/v1/updates/none")) == (404, "NotFoundError")
    assert error(rest.get("/v1/manifest", params={"checkpoint": "none"})) == (404, "CheckpointNotFoundError")
    assert rest.get("/control/state").status_code == 404
    assert error(rest.get("/v1/nothing")) == (404, "HTTPError")
    refused = rest.put("/v1/updates/1", json={})
    assert (error(refused), refused.headers["allow"]) == ((405, "HTTPError"), "GET, DELETE")
    assert rest.patch("/v1/holders/01234567").headers["allow"] == "PUT, DELETE"
    deep = b'{"checkpoint": "first", "ranks": [], "x": ' + b"[" * 100_000
    for metas in (b"", b"{}", deep, b'{"checkpoint": "first", "ranks": []}'):
        assert error(rest.put("/v1/holders/01234567", content=metas)) == (400, "ManifestError")


def test_metrics(rest: httpx.Client, engines: list[str]) -> None:
    follow(rest, start(rest, engines, pause="keep")["id"])
    page = rest.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(page)}
    updates = {s.labels["result"]: s.value for s in families["checkpoint_engine_updates"].samples if s.name.endswith("_total")}
    assert updates["committed"] >= 1
    assert {s.labels["rank"]: s.value for s in families["checkpoint_engine_rank_up"].samples} == {"0": 1, "1": 1}
    assert all(s.value > 0 for s in families["checkpoint_engine_region_bytes"].samples)
    stages = {s.labels["stage"] for s in families["checkpoint_engine_update_stage_seconds"].samples if "stage" in s.labels}
    assert stages >= {"lift", "share", "load"}
    assert lint(page) == []
    # No series for each update: of versions there is one a rank, and the build's.
    follow(rest, begun := start(rest, engines, version="another")["id"])
    page = rest.get("/metrics").text
    assert begun not in page and page.count('version="') <= RANKS + 1


def test_metrics_under_promtool(rest: httpx.Client, engines: list[str]) -> None:
    promtool = tool("promtool")
    follow(rest, start(rest, engines)["id"])
    page = rest.get("/metrics").text
    done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("# TYPE checkpoint_engine_pause_ms gauge", "base unit"),
        ("# TYPE checkpoint_engine_things_total gauge", "named as a counter"),
        ("# TYPE checkpoint_engine_update histogram", "without a unit"),
        ('checkpoint_engine_updates_by_id{id="1"} 1', "no TYPE"),
        ('# TYPE checkpoint_engine_x gauge\ncheckpoint_engine_x{update="1-a"} 1', "many values"),
        ("# TYPE checkpoint_engine_y gauge\ncheckpoint_engine_y 1\ncheckpoint_engine_y 2", "twice"),
        ("# TYPE ckptEngine gauge\nckptEngine 1", "snake case"),
    ],
)
def test_what_the_lint_finds(line: str, problem: str) -> None:
    assert any(problem in found for found in lint(f"{line}\n"))


def test_a_rank_that_dies(model: Path) -> None:
    """It is named: by the record of the next update, by the fleet's view, and to Prometheus."""
    with engine_processes(model, [[]] * RANKS) as urls, doomed(RANKS, urls) as (served, rest):
        assert rest.post("/v1/checkpoints", json={"name": "first", "directory": str(model)}).status_code == 201
        record = follow(rest, start(rest, [])["id"])  # of the engines that the server was started with
        assert [replica["endpoint"] for replica in record["report"]["replicas"]] == urls
        served.ranks.kill(1)
        record = follow(rest, start(rest, [])["id"])
        assert (record["state"], record["error"]["type"]) == ("failed", "PeerLostError")
        assert "rank 1" in record["error"]["message"]
        view = until(rest, "/v1/events", lambda data: isinstance(data, dict) and data["ranks"][1]["error"])
        assert view["ranks"][1]["state"]["server"]["rank"] == 1  # as it was last
        ups = re.findall(r'rank_up\{host=".*",rank="(\d)"\} (\S+)', rest.get("/metrics").text)
        assert ups == [("0", "1.0"), ("1", "0.0")]
        assert error(rest.post("/v1/checkpoints", json={"name": "more", "directory": str(model)})) == (503, "PeerLostError")
        assert [c["name"] for c in rest.get("/v1/checkpoints").json()] == ["first"]
        assert rest.get("/v1/healthz").status_code == 200


@contextmanager
def doomed(ranks: int, urls: list[str]) -> Iterator[tuple[Served, httpx.Client]]:
    """A fleet whose ranks may die, and which was started with these engines."""
    endpoints = [word for url in urls for word in ("--endpoint", url)]
    with serving(ranks, "--port", "0", *endpoints, may_die=range(1, ranks)) as served, served.client() as client:
        wait_until_met(client, ranks)
        yield served, client
