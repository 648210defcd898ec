"""The client of vLLM, against answers of the shapes that its versions give."""

from __future__ import annotations

import json
from typing import Any

import pytest

from checkpoint_engine.engines import Weights
from checkpoint_engine.engines.vllm import Vllm
from checkpoint_engine.errors import EngineRefusedError
from embedded_support import answering

HANDLES = [("CPU-a-0", "ipc:///x/0"), ("CPU-a-1", "ipc:///x/1")]
GOOD = {"rank": 0, "ok": True, "error": None, "version": "v1", "dirty": False}
BAD = {"rank": 1, "ok": False, "error": "tensor 'a.b': wrong shape", "version": "v0", "dirty": True}


class Server:
    """Answers each path with what `answers` has for it, else 404; remembers what it was asked."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers, self.seen = answers, list[tuple[str, str]]()

    def __call__(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        self.seen.append((method, path))
        answer = self.answers.get(path)
        return (404, b"") if answer is None else (200, b"" if answer == "" else json.dumps(answer).encode())


@pytest.mark.parametrize("results", [[GOOD, GOOD], [str(GOOD), str(GOOD)], [None], []])
def test_update_then_reset_the_cache_and_publish(results: list[Any]) -> None:
    reset = "/reset_prefix_cache?reset_running_requests=true"
    server = Server({"/collective_rpc": {"results": results}, reset: "", "/update_weight_version": {"success": True}})
    with answering(server) as url, Vllm(url) as engine:
        engine.update(HANDLES, version="v1", seconds=10)
        engine.finish("v1", seconds=10)
    assert server.seen == [("POST", path) for path in ("/collective_rpc", reset, "/update_weight_version")]


@pytest.mark.parametrize("results", [[GOOD, BAD], [str(GOOD), str(BAD)]])
def test_refusal_names_worker_and_reason(results: list[Any]) -> None:
    with (
        answering(Server({"/collective_rpc": {"results": results}})) as url,
        Vllm(url) as engine,
        pytest.raises(EngineRefusedError, match=r"worker 1: tensor 'a\.b': wrong shape"),
    ):
        engine.update(HANDLES, version="v1", seconds=10)


@pytest.mark.parametrize("results", [["out of cheese"], [3], [[]]])
def test_answer_of_another_shape(results: list[Any]) -> None:
    with (
        answering(Server({"/collective_rpc": {"results": results}})) as url,
        Vllm(url) as engine,
        pytest.raises(EngineRefusedError, match="another shape"),
    ):
        engine.update(HANDLES, version="v1", seconds=10)


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([GOOD], Weights("v1", False)),
        ([GOOD, BAD], Weights("v1", True)),
        ([GOOD, {**GOOD, "version": "v2"}], Weights("v1", True)),
    ],
)
def test_weights(results: list[Any], expected: Weights) -> None:
    with answering(Server({"/collective_rpc": {"results": results}})) as url, Vllm(url) as engine:
        assert engine.weights() == expected


def test_weights_of_a_server_without_the_extension() -> None:
    with answering(Server({})) as url, Vllm(url) as engine:
        assert engine.weights() is None
        assert engine.paused() is None


def test_pause_and_resume() -> None:
    paths = {f"/pause?mode={mode}&clear_cache=true": {"status": "paused"} for mode in ("abort", "wait", "keep")}
    server = Server({**paths, "/resume": {"status": "resumed"}, "/is_paused": {"is_paused": True}})
    with answering(server) as url, Vllm(url) as engine:
        engine.pause("abort", 10)
        engine.pause("wait", 10)
        engine.pause("keep", 10)
        assert engine.paused() is True
        engine.resume(10)
    assert [path for _, path in server.seen] == [*paths, "/is_paused", "/resume"]


def test_cache_that_cannot_be_reset() -> None:
    path = "/reset_prefix_cache?reset_running_requests=true"
    with (
        answering(Server({path: {"success": False}})) as url,
        Vllm(url) as engine,
        pytest.raises(EngineRefusedError, match="could not be reset"),
    ):
        engine.reset_prefix_cache(10)
