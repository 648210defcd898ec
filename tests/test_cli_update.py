"""`checkpoint-engine update` of real embedded engines: its options, its reports and its exit codes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_engine import cli
from checkpoint_engine.cli.update import sockets
from checkpoint_engine.engines.sglang import SGLang
from checkpoint_engine.errors import SettingsError
from checkpoint_engine.timeline import from_chrome
from helpers.engines import engine_processes
from helpers.ranks import run_ranks

RANKS = 2
SECONDS = 20.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from embedded_support import save_bert

    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def spoilt(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's checkpoint with a tensor of a wrong shape in its last layer."""
    tensors = load_file(model / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"] = torch.zeros(3, 3)
    path = tmp_path_factory.mktemp("spoilt")
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def engines(model: Path) -> Iterator[list[str]]:
    with engine_processes(model, [[]] * RANKS) as urls:
        yield urls


def _command(rank: int, world_size: int, arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, as torchrun would start it."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = cli.run(["update", *arguments])
    return code, out.getvalue(), err.getvalue()


def update(checkpoint: Path, urls: list[str], *options: str, buckets: int = 4096) -> list[Any]:
    endpoints = [word for url in urls for word in ("--endpoint", url)]
    arguments = ["--checkpoint", str(checkpoint), *endpoints, "--inference-parallel-size", "1", "--wait", "20", *options]
    return run_ranks(_command, len(urls), arguments, env={"CHECKPOINT_ENGINE_BUCKET_BYTES": str(buckets)})


def states(urls: list[str]) -> list[tuple[str | None, bool, bool]]:
    """(version, dirty, paused) of each engine."""
    seen = []
    for url in urls:
        with closing(SGLang(url)) as client:
            weights = client.weights()
            assert weights is not None
            seen.append((*weights, client.request("GET", "/is_paused", None, SECONDS).json()["is_paused"]))
    return seen


def test_paused_update_and_its_report(engines: list[str], model: Path, tmp_path: Path) -> None:
    leader, other = update(model, engines, "--pause", "keep", "--weight-version", "v1", "--json")
    assert (leader[0], other[:2]) == (0, (0, ""))
    report = json.loads(leader[1])
    assert report["version"] == "v1"
    assert report["stages"]["verify"]["nbytes"] >= report["nbytes"]
    assert report["pause_ms"] > 0
    assert [replica["endpoint"] for replica in report["replicas"]] == engines
    assert max(replica["pause_ms"] for replica in report["replicas"]) == report["pause_ms"]
    assert states(engines) == [("v1", False, False)] * RANKS
    trace = tmp_path / "t.json"
    options = ("--verify", "off", "--trace", str(trace))
    leader, _ = update(model, engines, "--pause", "abort", "--weight-version", "v2", *options)
    assert "engines were paused for " in leader[1]
    assert "verify" not in leader[1]
    read = from_chrome(trace.read_bytes())
    assert (read.version, [timeline.rank for timeline in read.ranks]) == ("v2", [0, 1])
    assert states(engines) == [("v2", False, False)] * RANKS


def test_mixed_weights_stay_paused_until_healed(engines: list[str], model: Path, spoilt: Path) -> None:
    results = update(spoilt, engines, "--pause", "keep")
    assert [code for code, _, _ in results] == [1, 1]
    for url, (_, _, said) in zip(engines, results, strict=True):
        assert f"checkpoint-engine: engine at {url} stays paused: its weights are a mixture" in said
    assert "encoder.layer.1.output.dense.weight" in results[0][2]
    assert [state[1:] for state in states(engines)] == [(True, True)] * RANKS
    results = update(spoilt, engines, "--pause", "keep", "--resume-dirty")
    assert [code for code, _, _ in results] == [1, 1]
    assert [state[1:] for state in states(engines)] == [(True, False)] * RANKS
    assert [code for code, _, _ in update(model, engines, "--pause", "wait", "--weight-version", "v3")] == [0, 0]
    assert states(engines) == [("v3", False, False)] * RANKS


def test_what_engines_served_is_put_back(engines: list[str], model: Path, spoilt: Path) -> None:
    results = update(spoilt, engines, "--pause", "keep", "--restore-from", str(model))
    assert [code for code, _, _ in results] == [1, 1]
    ((version, dirty, paused),) = set(states(engines))
    assert (version.partition("@")[0], dirty, paused) == (model.name, False, False)
    said = "".join(err for _, _, err in results)  # by one rank for all
    assert f"; {version!r} was restored" in said
    assert "stays paused" not in said
    assert [code for code, _, _ in update(model, engines, "--restore-from", str(spoilt / "none"))] == [2, 2]


def test_replica_that_fails(engines: list[str], model: Path) -> None:
    """Unreachable before the update: code 3 on all ranks, and one line; or the others are updated without it."""
    urls = [engines[0], "http://127.0.0.1:1"]
    results = update(model, urls, "--pause", "keep", "--weight-version", "no", "--wait", "0.3")
    assert [code for code, _, _ in results] == [3, 3]
    said = "".join(err for _, _, err in results)
    assert said.count("\n") == 1
    assert "error on rank 1: engine at http://127.0.0.1:1: " in said
    assert states(engines[:1])[0][0] != "no"
    options = ("--pause", "keep", "--weight-version", "v4", "--wait", "0.3", "--on-replica-failure", "continue")
    results = update(model, urls, *options)
    assert [code for code, _, _ in results] == [0, 0]
    assert "not updated: engine at http://127.0.0.1:1: " in results[0][1]
    assert states(engines[:1]) == [("v4", False, False)]


def test_mode_that_an_engine_does_not_have(engines: list[str], model: Path) -> None:
    """Told before anything is sent."""
    from embedded_support import answering

    asked = list[str]()

    def answer(method: str, path: str, body: bytes) -> tuple[int, bytes]:
        asked.append(f"{method} {path}")
        return 200, b"{}"

    with answering(answer) as url:
        ((code, _, said),) = update(model, [url], "--engine", "tensorrt-llm", "--pause", "keep")
    assert code == 3
    assert "TensorRT-LLM has no route to pause with keep: use wait" in said
    assert asked == ["GET /health"]


def test_options_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["update", "--checkpoint", "/none", "--inference-parallel-size", "1", "--endpoint", "http://a"]
    for wrong in (["--pause", "stop"], ["--on-replica-failure", "retry"], ["--verify", "maybe"]):
        assert cli.run([*base, *wrong]) == 2
    capsys.readouterr()
    assert sockets(["http://a", "http://b"], None) == [("http://a", None), ("http://b", None)]
    assert sockets(["http://a"], ["/x"]) == [("http://a", "/x")]
    with pytest.raises(SettingsError, match="2 endpoints and 1 Unix sockets"):
        sockets(["http://a", "http://b"], ["/x"])
