"""Rollouts to real embedded engines: requests while they are paused, and what becomes of each engine when one fails."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file

from checkpoint_engine.engines import Policy, Weights
from checkpoint_engine.engines.base import Handles
from checkpoint_engine.engines.sglang import SGLang
from checkpoint_engine.errors import CheckpointEngineError, EngineRefusedError, EngineUnreachableError, ReplicaError, UpdateError
from helpers.engines import engine_processes
from helpers.fleet import server
from helpers.ranks import run_ranks

# Ranks import this file: what takes seconds to import (transformers) is imported where it is used.
RANKS = 2
SECONDS = 20.0
SPOILT = "encoder.layer.1.output.dense.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints of one model."""
    from embedded_support import save_bert

    return [save_bert(tmp_path_factory.mktemp(f"bert-{seed}"), seed) for seed in range(2)]


@pytest.fixture(scope="module")
def engines(models: list[Path]) -> Iterator[list[str]]:
    """Two engines, one per rank."""
    with engine_processes(models[0], [[]] * RANKS) as urls:
        yield urls


def get(client: SGLang, path: str) -> Any:
    return client.request("GET", path, None, SECONDS).json()


class Asked(SGLang):
    """Is sent a request for embeddings as soon as it is asked to update."""

    answers: list[Any]
    thread: threading.Thread | None = None

    def _ask(self) -> None:
        self.answers.append(self.request("POST", "/embed", {"input": ["the cat sat"]}, SECONDS).json()["version"])

    def update(self, handles: Handles, *, version: str | None, seconds: float) -> None:
        self.answers = [get(self, "/is_paused")["is_paused"]]
        self.thread = threading.Thread(target=self._ask)
        self.thread.start()
        super().update(handles, version=version, seconds=seconds)


def push(ps: Any, file: str, rank: int, engines: list[SGLang], version: str, policy: Policy, spoil: bool = False) -> Any:
    """This rank's part of a push: its report, or its error and the notes of it. spoil: one tensor has a wrong shape."""
    mine = dict(list(load_file(file).items())[rank::RANKS])
    if spoil and SPOILT in mine:
        mine[SPOILT] = mine[SPOILT][:3].clone()
    try:
        return ps.push(mine.items(), engines=engines, version=version, policy=policy)
    except CheckpointEngineError as e:
        return type(e), str(e), getattr(e, "__notes__", [])


def _modes(rank: int, world_size: int, urls: list[str], files: list[str], modes: list[str | None]) -> list[Any]:
    seen = []
    with server(bucket_bytes=4096) as ps, ExitStack() as stack:
        clients: list[SGLang] = [stack.enter_context(Asked(url)) for url in urls]
        for number, mode in enumerate(modes):
            policy = Policy(pause=mode, ready_seconds=SECONDS)  # type: ignore[arg-type]
            version = f"{mode}-{number}"
            report = push(ps, files[number % 2], rank, clients, version, policy)
            own = clients[rank]
            assert isinstance(own, Asked) and own.thread is not None
            own.thread.join(SECONDS)
            seen.append((report, own.answers, own.weights(), get(own, "/is_paused")["is_paused"]))
    return seen


def test_requests_while_engines_are_paused(engines: list[str], models: list[Path]) -> None:
    """None fails. Those that come during a pause are answered by the new weights; afterwards nothing is paused."""
    modes = ["keep", "abort", "wait", None]
    answers: list[int] = []
    ended = threading.Event()

    def ask() -> None:
        with httpx.Client(trust_env=False, timeout=SECONDS) as client:
            while not ended.is_set():
                answers.append(client.post(f"{engines[0]}/embed", json={"input": ["a dog ran"]}).status_code)

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for client in clients:
        client.start()
    try:
        results = run_ranks(_modes, RANKS, engines, [str(m / "model.safetensors") for m in models], modes)
    finally:
        ended.set()
        for client in clients:
            client.join(SECONDS)
    assert set(answers) <= {200, 503}
    assert answers.count(503) <= len(clients)  # those that mode abort dropped
    for rank_seen in results:
        for number, (report, (paused, answered_by), weights, paused_after) in enumerate(rank_seen):
            mode = modes[number]
            version = f"{mode}-{number}"
            by_call = mode in ("keep", "abort")  # SGLang's update waits by itself
            assert report.version == version
            assert weights == Weights(version, False)
            assert (paused, paused_after) == (by_call, False)
            assert answered_by == version if by_call else answered_by is not None
            assert math.isnan(report.pause_ms) != by_call
            assert not by_call or report.pause_ms > 0
            assert report.attempts == 1
            assert report.to_dict()["pause_ms"] == (report.pause_ms if by_call else None)
    assert results[0][0][0].replicas == results[1][0][0].replicas


def _dirty(rank: int, world_size: int, urls: list[str], file: str) -> list[Any]:
    seen = []

    def look(result: Any) -> None:
        own = clients[rank]
        try:
            own.request("POST", "/embed", {"input": ["the cat sat"]}, 0.3)
            answer: int | str = 200
        except EngineRefusedError as e:
            answer = e.status
        except CheckpointEngineError:
            answer = "waits"
        state = own.weights()
        seen.append((result, state and state.dirty, get(own, "/is_paused")["is_paused"], answer))
        ps.store_based_barrier()

    with server(bucket_bytes=4096) as ps, ExitStack() as stack:
        clients = [stack.enter_context(SGLang(url)) for url in urls]
        held, forced = Policy(pause="keep"), Policy(pause="keep", resume_dirty=True)
        look(push(ps, file, rank, clients, "a", held, spoil=True))
        look(push(ps, file, rank, clients, "b", forced, spoil=True))
        look(push(ps, file, rank, clients, "c", Policy(pause="wait"), spoil=True))
        with SGLang("http://127.0.0.1:1") as nobody:  # fails before any byte: what was dirty stays dirty and paused
            look(push(ps, file, rank, [clients[0], nobody], "d", Policy(pause="keep")))
        look(push(ps, file, rank, clients, "e", held))
    return seen


def test_dirty_engines_stay_paused(engines: list[str], models: list[Path]) -> None:
    for rank, seen in enumerate(run_ranks(_dirty, RANKS, engines, str(models[0] / "model.safetensors"))):
        held, forced, waited, unreachable, healed = seen
        kind, said, notes = held[0]
        assert kind is UpdateError
        assert SPOILT in said
        assert notes == [f"engine at {engines[rank]} stays paused: its weights are a mixture until the next complete update"]
        assert held[1:] == (True, True, "waits")
        assert forced[0][2] == []
        assert forced[1:] == (True, False, 503)
        assert waited[1:] == (True, True, "waits")  # its update did not pause it, so it was paused after it
        assert unreachable[0][0] is (ReplicaError if rank == 0 else EngineUnreachableError)
        assert "Connection refused" in unreachable[0][1]
        assert unreachable[1:] == (True, True, "waits")
        assert healed[0].version == "e"
        assert healed[1:] == (False, False, 200)


def _without(rank: int, world_size: int, urls: list[str], bad: str, file: str, policies: list[Policy]) -> list[Any]:
    seen = []
    with server(bucket_bytes=4096, attach_timeout=0.5) as ps, ExitStack() as stack:
        clients = [stack.enter_context(SGLang(url)) for url in (urls[0], bad)]
        for number, policy in enumerate(policies):
            result = push(ps, file, rank, clients, f"w{number}", policy)
            ps.store_based_barrier()  # each rank resumes its own engine
            seen.append((result, clients[0].weights(), get(clients[0], "/is_paused")["is_paused"]))
            ps.store_based_barrier()
        own = [stack.enter_context(SGLang(url)) for url in urls]
        seen.append(push(ps, file, rank, own, "all", Policy(pause="keep")))
    return seen


@pytest.mark.parametrize("bad", ["broken", "liar", "pause"])
def test_going_on_without_an_engine_that_fails(engines: list[str], models: list[Path], bad: str) -> None:
    """abort: no engine is updated and clean ones go on; continue: the others are. Either way the next push is as any."""
    from embedded_support import answering

    asked = list[str]()

    def answer(method: str, path: str, body: bytes) -> tuple[int, bytes]:
        asked.append(path)
        if method == "GET":
            return 404, b""
        if path == {"broken": "/update_weights_from_ipc", "pause": "/pause_generation"}.get(bad):
            return 500, b"out of memory"
        return 200, json.dumps({"success": True}).encode()

    policies = [Policy(pause="keep"), Policy(pause="keep", on_replica_failure="continue")]
    with answering(answer) as url:
        results = run_ranks(_without, RANKS, engines, url, str(models[1] / "model.safetensors"), policies)
    reason = "waiting for the workers of ranks [1]" if bad == "liar" else "answered 500: out of memory"
    for rank, (aborted, went_on, everybody) in enumerate(results):
        (kind, said, notes), weights, paused = aborted
        assert kind is ((ReplicaError if rank == 0 else EngineRefusedError) if bad == "pause" else UpdateError)
        assert reason in said
        assert notes == []
        assert (weights.version != "w0", weights.dirty, paused) == (True, False, False)
        report, weights, paused = went_on
        assert (weights, paused) == (Weights("w1", False), False)
        assert list(report.failed) == [url]
        assert reason in report.failed[url]
        assert report.attempts == (1 if bad == "pause" else 2)
        assert reason in str(report)
        assert everybody.failed == {}
    # It was resumed each time that it may have been paused, because nothing had been loaded.
    assert asked.count("/continue_generation") == 2


def test_policy_is_checked() -> None:
    with pytest.raises(ValueError, match="no pause mode 'stop'"):
        Policy(pause="stop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="abort or continue, not 'retry'"):
        Policy(on_replica_failure="retry")  # type: ignore[arg-type]
