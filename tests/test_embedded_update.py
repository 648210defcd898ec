"""The embedded engine and real parameter servers: good updates, broken ones, and a replica of several processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
import torch

from checkpoint_engine.cli.demo.checkpoint import perturb, read_checkpoint
from checkpoint_engine.cli.demo.processes import Fleet, free_port_pair
from checkpoint_engine.cli.engine import worker
from checkpoint_engine.engines import Engine, Weights, get_engine, request_for_rank
from checkpoint_engine.engines.embedded.loader import expected_digests
from checkpoint_engine.engines.embedded.model import ServedModel
from checkpoint_engine.engines.embedded.service import EmbeddedEngine
from checkpoint_engine.errors import UpdateError
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.settings import Settings
from embedded_support import save_bert, serving

WAIT = 40


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def engine(bert: Path) -> Iterator[tuple[ServedModel, Engine]]:
    model = ServedModel.load(bert, "dummy")
    with serving(EmbeddedEngine(model, worker(None))) as url, get_engine("sglang", url) as client:
        yield model, client


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ParameterServer]:
    settings = Settings(socket_dir=tmp_path, bucket_bytes=4096)
    with ParameterServer(rank=0, world_size=1, master_addr="127.0.0.1", master_port=free_port_pair(), settings=settings) as ps:
        yield ps


def update(ps: ParameterServer, engine: Engine, name: str, tensors: dict[str, torch.Tensor]) -> None:
    ps.register_checkpoint(name, named_tensors=tensors)
    ps.gather_metas(name)
    ps.update(name, request_for_rank([engine], 0, 1, name, WAIT), timeout=timedelta(seconds=WAIT), version=name)


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape"])
def test_broken_checkpoint_then_a_good_one(
    bert: Path, engine: tuple[ServedModel, Engine], server: ParameterServer, fault: str
) -> None:
    model, client = engine
    good = read_checkpoint(bert)
    last = sorted(good)[-1]
    update(server, client, "good", good)
    assert client.weights() == Weights("good", False)
    broken = {name: perturb(name, tensor) for name, tensor in good.items()}
    if fault == "missing":
        del broken[last]
    elif fault == "unknown":
        broken["zz.unheard_of"] = torch.zeros(3)
    else:
        broken[last] = torch.zeros(7)
    with pytest.raises(UpdateError, match="zz.unheard_of" if fault == "unknown" else last) as failed:
        update(server, client, "broken", broken)
    assert failed.value.stage == ("post_hook" if fault == "missing" else "load")
    weights = client.weights()
    assert weights is not None and weights.version == "good"
    if fault == "missing":
        assert weights.dirty
    if weights.dirty:
        assert httpx.post(f"{client.endpoint}/embed", json={"input": ["cat"]}, timeout=WAIT, trust_env=False).status_code == 503
    update(server, client, "healed", {name: perturb(name, tensor) for name, tensor in good.items()})
    assert client.weights() == Weights("healed", False)
    assert model.targets.digests() == expected_digests(model.targets, {n: perturb(n, t) for n, t in good.items()})


def test_replica_of_two_processes(bert: Path, tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        common = ["checkpoint_engine", "engine", str(bert), "--load-format", "dummy", "--until-stdin-ends"]
        follower = fleet.start("follower", *common).line(WAIT, "to start").split()[-1]
        leader = fleet.start("leader", *common, "--follower", follower).line(WAIT, "to start").split()[-1]
        given = {
            "world_size": 2,
            "master_port": free_port_pair(),
            "urls": [leader],
            "checkpoint": str(bert),
            "seconds": WAIT,
            "peer_transport": "auto",
        }
        servers = [
            fleet.start(f"server {rank}", "checkpoint_engine.cli.demo.server", json.dumps({"rank": rank, **given}))
            for rank in range(2)
        ]
        for name in ("real", "perturbed"):
            for child in servers:
                child.send({"name": name, "perturbed": name == "perturbed"})
        tensors = read_checkpoint(bert)
        expected = expected_digests(ServedModel.load(bert, "dummy").targets, {n: perturb(n, t) for n, t in tensors.items()})
        for child in servers:
            answers = [json.loads(child.line(WAIT, "to answer")) for _ in range(3)]
            assert [a["ok"] for a in answers] == [True] * 3, answers
        for url in (leader, follower):
            found = httpx.get(f"{url}/v1/parameters/digest", timeout=WAIT, trust_env=False).json()
            assert found == expected
            with get_engine("sglang", url) as client:
                assert client.weights() == Weights("perturbed", False)
