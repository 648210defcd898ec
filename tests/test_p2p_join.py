"""`checkpoint-engine join`: a new engine gets real weights from the servers of a running world, by its REST API or a file."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from checkpoint_engine import cli
from checkpoint_engine.engines.sglang import SGLang
from helpers.engines import engine_processes
from helpers.ports import free_ports
from helpers.ranks import run_ranks
from helpers.rest import Served, model_dir, serving, wait_until_met

SECONDS = 20.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_dir(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def fleet(model: Path) -> Iterator[Served]:
    """Two servers that hold the checkpoint "first"."""
    with serving(2) as served:
        with served.client() as client:
            wait_until_met(client, 2)
            made = client.post("/v1/checkpoints", json={"name": "first", "directory": str(model)})
            assert made.status_code == 201, made.text
        yield served


def _command(rank: int, world_size: int, arguments: list[str]) -> tuple[int, str, str]:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = cli.run(["join", *arguments])
    return code, out.getvalue(), err.getvalue()


def join(source: str, urls: list[str], *options: str) -> list[Any]:
    endpoints = [word for url in urls for word in ("--endpoint", url)]
    env = {"CHECKPOINT_ENGINE_BUCKET_BYTES": "4096", "CHECKPOINT_ENGINE_CONNECT_TIMEOUT": "5"}
    return run_ranks(_command, len(urls), ["--from", source, *endpoints, "--wait", "20", *options], env=env)


def digests_of(urls: list[str]) -> list[dict[str, str]]:
    seen = []
    for url in urls:
        with closing(SGLang(url)) as client:
            seen.append(client.request("GET", "/v1/parameters/digest", None, SECONDS).json())
    return seen


def expected(model: Path) -> dict[str, str]:
    from checkpoint_engine.cli.demo.checkpoint import read_checkpoint
    from checkpoint_engine.engines.embedded.loader import expected_digests
    from checkpoint_engine.engines.embedded.model import ServedModel

    return expected_digests(ServedModel.load(model, "dummy").targets, read_checkpoint(model))


@pytest.mark.timeout(120)
def test_engines_join_a_running_world(fleet: Served, model: Path, tmp_path: Path) -> None:
    with engine_processes(model, [[]] * 2) as urls:
        assert expected(model) not in digests_of(urls)
        ((code, out, said),) = join(fleet.url, urls[:1], "--json", "--weight-version", "v1")
        assert (code, said.count("error")) == (0, 0), said
        report = json.loads(out)
        assert report["version"] == "v1"
        assert report["method"] == "p2p (shm)"
        assert digests_of(urls[:1]) == [expected(model)]
        with fleet.client() as client:
            (tmp_path / "metas.json").write_bytes(client.get("/v1/manifest", params={"checkpoint": "first"}).content)
        results = join(str(tmp_path / "metas.json"), urls)  # as a replica of one rank each, in a world of two
        assert [code for code, _, _ in results] == [0, 0], results
        assert "by p2p (shm)" in results[0][1]
        assert digests_of(urls) == [expected(model)] * 2


def test_what_cannot_be_joined(fleet: Served, tmp_path: Path) -> None:
    (tmp_path / "not.json").write_text("{")
    nobody = f"http://127.0.0.1:{free_ports(1)}"
    engine = ["http://127.0.0.1:1"]
    for source, options, code, words in [
        (str(tmp_path / "not.json"), (), 2, "not.json has no metas"),
        (str(tmp_path / "none.json"), (), 2, "No such file"),
        (fleet.url, ("--name", "other"), 2, "checkpoint 'other' is not registered"),
        (nobody, (), 4, f"the server at {nobody} is gone"),
        (fleet.url, ("--wait", "0.3"), 3, "engine at http://127.0.0.1:1: "),
    ]:
        ((found, _, said),) = join(source, engine, *options)
        assert (found, words in said) == (code, True), said
