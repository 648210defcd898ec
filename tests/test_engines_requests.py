"""What clients ask of LMDeploy, TensorRT-LLM and SGLang, against servers that take only the documented request shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from checkpoint_engine.engines import Engine, PauseMode, get_engine
from checkpoint_engine.engines.rollout import Policy, Turn
from checkpoint_engine.errors import EngineRefusedError, EngineUnreachableError, EngineUnsupportedError, SettingsError
from embedded_support import answering

HANDLES = [("GPU-a", "ipc:///x/0"), ("GPU-b", "ipc:///x/1")]
SECONDS = 10.0


class Fake:
    """A server that remembers what it is asked and has one method per route; what it has no method for is 404."""

    def __init__(self) -> None:
        self.asked = list[tuple[str, str, Any]]()

    def __call__(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        self.asked.append((method, path, json.loads(body) if body else None))
        route, _, query = path.partition("?")
        answer = getattr(self, f"{method.lower()}_{route.strip('/')}", None)
        status, content = answer(self.asked[-1][2], query) if answer else (404, "no such route")
        return status, json.dumps(content).encode()

    @property
    def posts(self) -> list[tuple[str, Any]]:
        return [(path, body) for method, path, body in self.asked if method == "POST"]


class LMDeployServer(Fake):
    """Of the routes in LMDeploy's documentation: weights are taken while it sleeps with its weights awake only."""

    def __init__(self, uuids: list[str]) -> None:
        super().__init__()
        self.uuids, self.asleep, self.updated, self.fail = uuids, set[str](), False, False

    def get_health(self, body: Any, query: str) -> tuple[int, Any]:
        return 200, {"status": "sleeping" if self.asleep else "healthy"}

    def post_abort_request(self, body: Any, query: str) -> tuple[int, Any]:
        return (200, "") if body == {"abort_all": True} else (400, "which request?")

    def post_sleep(self, body: Any, query: str) -> tuple[int, Any]:
        self.asleep = {"weights", "kv_cache"}
        return (200, "") if query == "level=2" and body == {} else (400, "level?")

    def post_wakeup(self, body: Any, query: str) -> tuple[int, Any]:
        tag = query.removeprefix("tags=")
        if tag == "kv_cache" and not self.updated:
            return 400, "there are no weights"
        self.asleep -= {tag}
        return 200, ""

    def _reason(self) -> str:
        return "" if self.asleep == {"kv_cache"} else "Engine must be sleeping with kv_cache unavailable."

    def get_update_weights_from_ipc(self, body: Any, query: str) -> tuple[int, Any]:
        return 200, {"ready": not self._reason(), "message": self._reason(), "device_uuids": self.uuids}

    def post_update_weights_from_ipc(self, body: Any, query: str) -> tuple[int, Any]:
        reason = self._reason() or ("worker 1 failed" if self.fail else "")
        self.updated = not reason and body == {"zmq_handles": dict(HANDLES)}
        return 200 if self.updated else 400, {"success": self.updated, "message": reason}


@contextmanager
def client(kind: str, server: Fake) -> Iterator[Engine]:
    with answering(server) as url, get_engine(kind, url) as engine:
        yield engine


@pytest.mark.parametrize("mode", ["wait", "abort"])
def test_lmdeploy_in_its_documented_order(mode: PauseMode) -> None:
    server = LMDeployServer([uuid for uuid, _ in HANDLES])
    with client("lmdeploy", server) as engine:
        engine.wait_ready(SECONDS)
        assert engine.pause(mode, SECONDS)
        engine.update(HANDLES, version="v", seconds=SECONDS)
        engine.finish("v", SECONDS)
        engine.resume(SECONDS)
    abort = [("/abort_request", {"abort_all": True})] if mode == "abort" else []
    assert server.posts == [
        *abort,
        ("/sleep?level=2", {}),
        ("/wakeup?tags=weights", {}),
        ("/update_weights_from_ipc", {"zmq_handles": dict(HANDLES)}),
        ("/wakeup?tags=kv_cache", {}),
    ]
    assert not server.asleep


def test_lmdeploy_says_why_it_takes_no_weights() -> None:
    server = LMDeployServer(["GPU-b", "GPU-a"])
    with client("lmdeploy", server) as engine:
        with pytest.raises(EngineRefusedError, match="must be sleeping"):
            engine.update(HANDLES, version=None, seconds=SECONDS)
        with pytest.raises(EngineUnsupportedError, match="cannot keep"):
            engine.pause("keep", SECONDS)
        assert server.posts == []  # nothing was sent by either
        engine.pause("wait", SECONDS)
        with pytest.raises(EngineRefusedError, match=r"workers are on \['GPU-b', 'GPU-a'\]"):
            engine.update(HANDLES, version=None, seconds=SECONDS)
        server.uuids.reverse()
        server.fail = True
        with pytest.raises(EngineRefusedError, match="worker 1 failed"):
            engine.update(HANDLES, version=None, seconds=SECONDS)


def test_lmdeploy_has_no_old_weights_to_go_back_to() -> None:
    """Paused, it has dropped its weights: after a failure it stays paused, whoever says that no byte was loaded."""
    server = LMDeployServer([uuid for uuid, _ in HANDLES])
    server.fail = True
    with client("lmdeploy", server) as engine:
        turn = Turn(engine, Policy(pause="wait", call_seconds=SECONDS))
        turn.pause()
        with pytest.raises(EngineRefusedError):
            turn.update(HANDLES, "v", SECONDS)
        assert "stays paused" in str(turn.give_up(dirty=False))
        assert server.asleep == {"kv_cache"}
        server.fail = False
        again = Turn(engine, Policy(pause="wait", call_seconds=SECONDS))
        again.pause()
        again.update(HANDLES, "v", SECONDS)
        again.finish("v")
    assert not server.asleep
    assert again.pause_ms > 0


class TrtllmServer(Fake):
    def __init__(self, answer: tuple[int, Any] = (200, {"status": "success"})) -> None:
        super().__init__()
        self.answer = answer

    def get_health(self, body: Any, query: str) -> tuple[int, Any]:
        return 200, ""

    def post_update_weights(self, body: Any, query: str) -> tuple[int, Any]:
        return self.answer if body == {"weights": dict(HANDLES)} else (422, "weights: dict[str, str]")


def test_tensorrt_llm() -> None:
    server = TrtllmServer()
    with client("tensorrt-llm", server) as engine:
        engine.wait_ready(SECONDS)
        assert not engine.pause("wait", SECONDS)  # its update does that
        engine.update(HANDLES, version="v", seconds=SECONDS)
        engine.finish("v", SECONDS)
        for mode in ("keep", "abort"):
            with pytest.raises(EngineUnsupportedError, match=mode):
                engine.pause(mode, SECONDS)  # type: ignore[arg-type]
        with pytest.raises(EngineUnsupportedError):
            engine.resume(SECONDS)
    assert server.posts == [("/update_weights", {"weights": dict(HANDLES)})]


@pytest.mark.parametrize("answer", [(500, "AssertionError: only with AsyncLLM"), (200, {"status": "error: AsyncLLM"})])
def test_tensorrt_llm_that_fails(answer: tuple[int, Any]) -> None:
    with client("tensorrt-llm", TrtllmServer(answer)) as engine, pytest.raises(EngineRefusedError, match="AsyncLLM"):
        engine.update(HANDLES, version=None, seconds=SECONDS)


class SGLangServer(Fake):
    """pause_generation takes the modes of 0.5.17 and 0.5.23; flush_cache refuses while requests run."""

    idle = True

    def post_pause_generation(self, body: Any, query: str) -> tuple[int, Any]:
        return (200, {"status": "ok"}) if body in ({"mode": m} for m in ("abort", "retract", "in_place")) else (422, "mode?")

    def post_continue_generation(self, body: Any, query: str) -> tuple[int, Any]:
        return (200, {"status": "ok"}) if body == {} else (422, "body?")

    def post_flush_cache(self, body: Any, query: str) -> tuple[int, Any]:
        return (200, "flushed") if self.idle else (400, "there are running requests")


def test_sglang_pauses_in_its_own_words() -> None:
    server = SGLangServer()
    with client("sglang", server) as engine:
        assert engine.pause("keep", SECONDS)
        assert engine.pause("abort", SECONDS)
        assert not engine.pause("wait", SECONDS)  # its update waits by itself
        engine.finish("v", SECONDS)  # its update did both
        engine.resume(SECONDS)
        engine.reset_prefix_cache(SECONDS)
        server.idle = False
        with pytest.raises(EngineRefusedError, match="running requests"):
            engine.reset_prefix_cache(SECONDS)
    modes = [("/pause_generation", {"mode": "retract"}), ("/pause_generation", {"mode": "abort"})]
    assert server.posts == [*modes, ("/continue_generation", {}), *[("/flush_cache", None)] * 2]


def test_token_is_sent_and_never_told() -> None:
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.send_error(401)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with (
            get_engine("tensorrt-llm", f"http://127.0.0.1:{server.server_port}", token="secret") as engine,
            pytest.raises(EngineRefusedError) as e,
        ):
            engine.update(HANDLES, version=None, seconds=SECONDS)
        thread.join(SECONDS)
    assert seen == ["Bearer secret"]
    assert "secret" not in str(e.value)


def test_an_answer_that_is_not_encoded_as_it_says() -> None:
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(b"no gzip")

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with get_engine("sglang", f"http://127.0.0.1:{server.server_port}") as engine, pytest.raises(EngineUnreachableError):
            engine.update(HANDLES, version=None, seconds=SECONDS)
        thread.join(SECONDS)


@pytest.mark.parametrize("token", ["secret\nof two lines", "sécret", "two secrets"])
def test_a_token_that_no_header_can_hold_is_not_told(token: str) -> None:
    with pytest.raises(SettingsError, match="on one line") as e:
        get_engine("sglang", "http://127.0.0.1:1", token=token)
    assert "cret" not in str(e.value)


def test_kinds_are_named() -> None:
    with pytest.raises(SettingsError, match="lmdeploy, sglang, tensorrt-llm, vllm"):
        get_engine("trt", "http://a")
