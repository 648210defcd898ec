"""The contract's routes on every rank, as callers of upstream's server use them: `python -m checkpoint_engine --uds PATH`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from checkpoint_engine.engines.sglang import SGLang
from checkpoint_engine.errors import SettingsError
from checkpoint_engine.http.contract import Request
from checkpoint_engine.http.schemas import ContractUpdateBody
from helpers.engines import engine_processes
from helpers.rest import model_dir

RANKS = 2
SECONDS = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_dir(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def clients(socket_dir: Path, master_port: int) -> Iterator[list[httpx.Client]]:
    """Of each rank's server; they end on SIGTERM and leave no socket."""
    common = {**os.environ, "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(master_port)}
    command = [sys.executable, "-m", "checkpoint_engine", "--uds", str(socket_dir / "rest-{rank}.sock")]
    with ExitStack() as stack:
        processes, clients = [], []
        for rank in range(RANKS):
            variables = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "CHECKPOINT_ENGINE_JOIN_TIMEOUT": "20"}
            processes.append(stack.enter_context(subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)))
            stack.callback(processes[rank].kill)
        for rank, process in enumerate(processes):
            path = str(socket_dir / f"rest-{rank}.sock")
            assert process.stdout is not None
            assert process.stdout.readline() == f"listening on unix:{path}\n"
            transport = httpx.HTTPTransport(uds=path)
            clients.append(stack.enter_context(httpx.Client(base_url="http://localhost", transport=transport, timeout=SECONDS)))
        yield clients
        for process in processes:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(SECONDS) for process in processes] == [128 + signal.SIGTERM] * RANKS


def everywhere(clients: list[httpx.Client], method: str, path: str, bodies: list[Any]) -> list[int]:
    """Collective calls: every rank is asked at the same time."""
    with ThreadPoolExecutor(RANKS) as pool:
        answers = list(pool.map(lambda ask: ask[0].request(method, path, json=ask[1]), zip(clients, bodies, strict=True)))
    return [answer.status_code for answer in answers]


def test_routes_of_the_contract(clients: list[httpx.Client], model: Path, tmp_path: Path) -> None:
    """Two ranks, each with its own files; one engine each, asked as vLLM is: what it is sent is passed on in its own words."""
    from embedded_support import answering

    tensors = sorted(load_file(model / "model.safetensors").items())
    files = []
    for rank in range(RANKS):
        files.append(str(tmp_path / f"part-{rank}.safetensors"))
        save_file(dict(tensors[rank::RANKS]), files[rank])
    asked: list[Any] = []

    def answer(method: str, path: str, body: bytes) -> tuple[int, bytes]:
        call = json.loads(body)
        asked.append((path, call["method"], len(call["args"][0])))
        engine = urls[0 if "rank0" in path else 1]
        passed_on = {"zmq_handles": call["args"][0]}
        answer = httpx.post(f"{engine}/update_weights_from_ipc", json=passed_on, timeout=SECONDS, trust_env=False)
        return answer.status_code, b'{"results": [null]}'

    with engine_processes(model, [[]] * RANKS) as urls, answering(answer) as front:
        assert [client.get("/v1/healthz").status_code for client in clients] == [200] * RANKS
        bodies: list[Any] = [{"files": [file]} for file in files]
        assert everywhere(clients, "POST", "/v1/checkpoints/mine/files", bodies) == [200] * RANKS
        assert everywhere(clients, "POST", "/v1/checkpoints/mine/files", bodies) == [409] * RANKS
        assert everywhere(clients, "POST", "/v1/checkpoints/mine/gather-metas", [None] * RANKS) == [200] * RANKS
        own = [{"update_url": f"{front}/rank{rank}", "inference_group_ranks": [rank], "timeout": 20} for rank in range(RANKS)]
        assert everywhere(clients, "POST", "/v1/checkpoints/mine/update", own) == [200] * RANKS
        assert sorted(asked) == [(f"/rank{rank}", "update_weights_from_ipc", 1) for rank in range(RANKS)]
        for url in urls:
            with SGLang(url) as engine:
                weights = engine.weights()
                assert weights is not None and str(weights.version).startswith("mine@") and not weights.dirty
        # The fleet's own routes see what the contract's did; only rank 0 answers them.
        (record,) = clients[0].get("/v1/updates").json()
        assert (record["state"], record["checkpoint"]) == ("committed", "mine")
        refused = clients[1].get("/v1/updates")
        assert (refused.status_code, refused.json()["error"]["type"]) == (421, "NotLeaderError")
        # An engine that fails: every rank says so, and what failed.
        own[1]["update_url"] = "http://127.0.0.1:1/collective_rpc"
        assert everywhere(clients, "POST", "/v1/checkpoints/mine/update", own) == [502] * RANKS
        assert everywhere(clients, "DELETE", "/v1/checkpoints/mine", [None] * RANKS) == [200] * RANKS
        assert everywhere(clients, "DELETE", "/v1/checkpoints/mine", [None] * RANKS) == [404] * RANKS


def test_a_path_that_two_ranks_share(socket_dir: Path) -> None:
    """The second one says how to give each its own."""
    path = socket_dir / "one.sock"
    command = [sys.executable, "-m", "checkpoint_engine", "--uds", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline().startswith("listening on ")
        second = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        first.terminate()
    assert second.returncode == 2
    assert "another process listens there; ranks of one host need {rank} in --uds" in second.stderr


def test_handles_that_an_engine_is_sent() -> None:
    handles = [(f"GPU-{rank}", f"ipc-{rank}") for rank in range(4)]
    Request(ContractUpdateBody())(handles)  # no URL: nobody is asked
    for body in (
        ContractUpdateBody(update_url="http://127.0.0.1:1/x", inference_group_ranks=[0, 4]),
        ContractUpdateBody(update_url="no URL"),
    ):
        request = Request(body)
        with pytest.raises(SettingsError, match=r"inference_group_ranks \[4\] are not in a world of 4|'no URL' is not") as caught:
            request(handles)
        assert request.refused is caught.value  # which the caller is told, instead of how the update ended
