"""The embedded engine's pause: which requests finish, which wait, which end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from checkpoint_engine.cli.engine import worker
from checkpoint_engine.engines.embedded.model import ServedModel
from checkpoint_engine.engines.embedded.service import EmbeddedEngine
from embedded_support import save_bert, serving

SECONDS = 20.0


class Running:
    """An engine whose thread is busy until `release`, and clients of it."""

    def __init__(self, engine: EmbeddedEngine, url: str, pool: ThreadPoolExecutor) -> None:
        self.engine, self.url, self.pool = engine, url, pool
        self.release = threading.Event()
        self._busy: Future[object] = Future()
        engine._compute._work.put((self._busy, lambda: self.release.wait(SECONDS)))

    def post(self, path: str, body: object) -> Future[httpx.Response]:
        return self.pool.submit(httpx.post, self.url + path, json=body, timeout=SECONDS, trust_env=False)

    def embed(self) -> Future[httpx.Response]:
        return self.post("/embed", {"input": ["the cat sat"]})

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.005)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return ServedModel.load(save_bert(Path(tmp_path_factory.mktemp("bert"))))


@pytest.fixture
def running(model: ServedModel) -> Iterator[Running]:
    engine = EmbeddedEngine(model, worker("v"), version="v")
    with serving(engine) as url, ThreadPoolExecutor(8) as pool:
        busy = Running(engine, url, pool)
        try:
            yield busy
        finally:
            busy.release.set()


@pytest.mark.parametrize(("mode", "status"), [("retract", 200), ("in_place", 200), ("abort", 503)])
def test_pause_and_continue(running: Running, mode: str, status: int) -> None:
    begun = [running.embed() for _ in range(3)]
    running.until(lambda: running.engine.gate.readers == 3)
    paused = running.post("/pause_generation", {"mode": mode})
    running.until(lambda: running.engine.paused)
    late = running.embed()
    assert not paused.done()  # something computes still
    running.release.set()
    assert paused.result(SECONDS).status_code == 200
    assert [answer.result(SECONDS).status_code for answer in begun] == [status] * 3
    assert (late.done(), running.engine.gate.readers) == (False, 0)
    assert running.post("/continue_generation", {}).result(SECONDS).status_code == 200
    assert late.result(SECONDS).json()["version"] == "v"


def test_modes_are_checked_and_continue_is_harmless(running: Running) -> None:
    running.release.set()
    assert running.post("/pause_generation", {"mode": "stop"}).result(SECONDS).status_code == 422
    assert running.post("/continue_generation", {}).result(SECONDS).status_code == 200
    assert running.post("/flush_cache", None).result(SECONDS).status_code == 200
    assert running.embed().result(SECONDS).status_code == 200
