"""Clients against real servers: what they send, and which error says what went wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.api import request_inference_to_update
from checkpoint_engine.engines import Engine, Weights, get_engine, request_for_rank
from checkpoint_engine.engines.base import Handles
from checkpoint_engine.engines.embedded.serve import bind
from checkpoint_engine.errors import DeadlineError, EngineRefusedError, EngineUnreachableError, SettingsError
from embedded_support import answering

HANDLES = [("CPU-a-0", "ipc:///x0"), ("CPU-a-1", "ipc:///x1")]
GOOD = b'{"success": true, "message": "done"}'


def test_sglang_request_shape() -> None:
    seen: list[tuple[str, str, object]] = []

    def answer(method: str, path: str, body: bytes) -> tuple[int, bytes]:
        seen.append((method, path, json.loads(body)))
        return 200, GOOD

    with answering(answer) as url, get_engine("sglang", url + "/") as engine:
        engine.update(HANDLES, version="v1", seconds=10)
    body = {"zmq_handles": dict(HANDLES), "flush_cache": True, "weight_version": "v1"}
    assert seen == [("POST", "/update_weights_from_ipc", body)]
    assert list(seen[0][2]["zmq_handles"]) == [uuid for uuid, _ in HANDLES]  # type: ignore[index]


def test_vllm_request_shape_and_the_contracts_function() -> None:
    seen: list[tuple[str, str, object]] = []

    def answer(method: str, path: str, body: bytes) -> tuple[int, bytes]:
        if path != "/collective_rpc":  # what only some of its versions and modes have
            return 404, b""
        seen.append((method, path, json.loads(body)))
        return 200, b'{"results": [null, null]}'

    with answering(answer) as url:
        with get_engine("vllm", url) as engine:
            engine.update(HANDLES, version="v1", seconds=10)
        request_inference_to_update(f"{url}/collective_rpc", dict(HANDLES), timeout=10)
    body = {"method": "update_weights_from_ipc", "args": [dict(HANDLES)], "timeout": 10}
    assert seen == [("POST", "/collective_rpc", body)] * 2


@pytest.mark.parametrize("name", ["sglang", "vllm"])
def test_engine_answers_500(name: str) -> None:
    with answering(lambda *_: (500, b"out of cheese")) as url, get_engine(name, url) as engine:
        with pytest.raises(EngineRefusedError, match="500: out of cheese") as e:
            engine.update(HANDLES, version=None, seconds=10)
        assert url in str(e.value) and isinstance(e.value, RuntimeError)


@pytest.mark.parametrize("body", [b'{"success": false, "message": "no such tensor"}', b"no such tensor", b'["no such tensor"]'])
def test_success_that_is_none(body: bytes) -> None:
    with (
        answering(lambda *_: (200, body)) as url,
        get_engine("sglang", url) as engine,
        pytest.raises(EngineRefusedError, match="no such tensor"),
    ):
        engine.update(HANDLES, version=None, seconds=10)


def test_unreachable() -> None:
    listener, url = bind("127.0.0.1", 0, None)
    listener.close()
    with get_engine("sglang", url) as engine:
        with pytest.raises(EngineUnreachableError, match=url):
            engine.update(HANDLES, version=None, seconds=5)
        with pytest.raises(EngineUnreachableError, match=url):
            engine.wait_ready(0.2)
    with pytest.raises(EngineUnreachableError, match=url):
        request_inference_to_update(url + "/collective_rpc", {})


@pytest.fixture
def stuck() -> Iterator[str]:
    """An engine that accepts requests and does not answer."""
    release = threading.Event()

    def answer(*_: object) -> tuple[int, bytes]:
        release.wait(30)
        return 200, GOOD

    with answering(answer) as url:
        yield url
        release.set()


def test_deadline(stuck: str) -> None:
    with get_engine("sglang", stuck) as engine:
        with pytest.raises(DeadlineError, match=stuck):
            engine.update(HANDLES, version=None, seconds=0.2)
        with pytest.raises(DeadlineError, match=stuck):
            engine.wait_ready(0.3)


def test_readiness() -> None:
    statuses = {"/ping": 503, "/health": 503}
    with (
        answering(lambda _, path, __: (statuses[path], b"")) as url,
        get_engine("sglang", url) as sglang,
        get_engine("vllm", url) as vllm,
    ):
        sglang.wait_ready(10)  # 503: it waits for its first weights
        with pytest.raises(DeadlineError, match="503"):
            vllm.wait_ready(0.2)
        statuses["/health"] = 200
        vllm.wait_ready(10)


def test_weights() -> None:
    answers = {"/v1/weights": (200, b'{"version": "a", "dirty": true}')}
    with answering(lambda _, path, __: answers[path]) as url, get_engine("sglang", url) as engine:
        assert engine.weights() == Weights("a", True)
        answers["/v1/weights"] = (404, b"")
        assert engine.weights() is None
        answers["/v1/weights"] = (200, b"[]")
        with pytest.raises(EngineRefusedError):
            engine.weights()


def test_settings_errors() -> None:
    with pytest.raises(SettingsError, match="nothing"):
        get_engine("nothing", "http://a")
    for url in ("localhost:80", "ftp://a", "http://"):
        with pytest.raises(SettingsError):
            get_engine("sglang", url)


class _Recorder(Engine):
    def __init__(self) -> None:
        self.endpoint, self.asked = "here", list[list[tuple[str, str]]]()

    def wait_ready(self, seconds: float) -> None: ...

    def update(self, handles: Handles, *, version: str | None, seconds: float) -> None:
        self.asked.append(list(handles))


@given(count=st.integers(1, 5), size=st.integers(1, 5))
def test_each_engine_is_asked_once_with_the_handles_of_its_ranks(count: int, size: int) -> None:
    world = count * size
    handles = [(f"uuid{r}", f"handle{r}") for r in range(world)]
    engines = [_Recorder() for _ in range(count)]
    for rank in range(world):
        request_for_rank(engines, rank, world, "v", 1.0)(handles)
    assert [e.asked for e in engines] == [[handles[i * size : (i + 1) * size]] for i in range(count)]


@pytest.mark.parametrize(("count", "rank", "world"), [(2, 0, 3), (0, 0, 2), (1, 2, 2), (1, -1, 2), (4, 0, 2)])
def test_ranks_that_do_not_fit(count: int, rank: int, world: int) -> None:
    with pytest.raises(SettingsError):
        request_for_rank([_Recorder() for _ in range(count)], rank, world)
