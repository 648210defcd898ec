"""The embedded engine over real HTTP. The worker's part is played by a function that the test holds in hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoint_engine.cli.demo.checkpoint import read_checkpoint
from checkpoint_engine.engines import Weights, get_engine
from checkpoint_engine.engines.embedded.loader import expected_digests
from checkpoint_engine.engines.embedded.model import ServedModel
from checkpoint_engine.engines.embedded.service import EmbeddedEngine
from checkpoint_engine.errors import EngineRefusedError
from embedded_support import answering, save_bert, save_llama, serving

Load = Callable[[list[tuple[str, torch.Tensor]]], None]
TEXTS = ["the cat sat", "a dog ran fast", "red"]
TIMEOUT = 20


class Session:
    """A sender in the test's hands: `steps` of one session, run in the engine's session thread."""

    def __init__(self) -> None:
        self.handles: list[str] = []
        self.script: Callable[[Load, Callable[[], None]], str] = lambda run, post_hook: "unset"

    def __call__(self, handle: str, *, run: Load, post_hook: Callable[[], None], model: object) -> str:
        self.handles.append(handle)
        return self.script(run, post_hook)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def session() -> Session:
    return Session()


@pytest.fixture
def engine(bert: Path, session: Session) -> Iterator[tuple[EmbeddedEngine, str]]:
    engine = EmbeddedEngine(ServedModel.load(bert, "dummy"), session, version="first")
    with serving(engine) as url:
        yield engine, url


def whole(checkpoint: dict[str, torch.Tensor], version: str) -> Callable[[Load, Callable[[], None]], str]:
    def script(run: Load, post_hook: Callable[[], None]) -> str:
        for pair in checkpoint.items():
            run([pair])
        post_hook()
        return version

    return script


def post(url: str, path: str, body: object) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=TIMEOUT, trust_env=False)


def get(url: str, path: str) -> Any:
    return httpx.get(url + path, timeout=TIMEOUT, trust_env=False).raise_for_status().json()


def update(url: str, version: str | None = None) -> None:
    with get_engine("sglang", url) as client:
        client.update([("CPU-a-0", "ipc:///a")], version=version, seconds=TIMEOUT)


def test_update_changes_answers_and_their_version(engine: tuple[EmbeddedEngine, str], session: Session, bert: Path) -> None:
    url = engine[1]
    checkpoint = read_checkpoint(bert)
    before = post(url, "/embed", {"input": TEXTS}).json()
    assert before["version"] == "first"
    session.script = whole(checkpoint, "second")
    update(url)
    after = post(url, "/embed", {"input": TEXTS}).json()
    assert after == {"embeddings": ServedModel.load(bert).embed(TEXTS), "version": "second"}
    assert after["embeddings"] != before["embeddings"]
    assert [pytest.approx(1.0, abs=1e-5)] * 3 == [sum(x * x for x in v) for v in after["embeddings"]]
    assert get(url, "/v1/weights") == {"version": "second", "dirty": False}
    assert get(url, "/v1/parameters/digest") == expected_digests(engine[0].model.targets, checkpoint)
    assert session.handles == ["ipc:///a"]


def test_requests_wait_for_a_session_and_running_ones_finish_first(
    engine: tuple[EmbeddedEngine, str], session: Session, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, url = engine
    checkpoint = read_checkpoint(bert)
    computing, compute, connected, half, finish = (threading.Event() for _ in range(5))
    real = service.model.embed

    def slow(inputs: list[str]) -> list[list[float]]:
        computing.set()
        assert compute.wait(TIMEOUT)
        return real(inputs)

    def script(run: Load, post_hook: Callable[[], None]) -> str:
        pairs = list(checkpoint.items())
        connected.set()
        run(pairs[:5])
        half.set()
        assert finish.wait(TIMEOUT)
        run(pairs[5:])
        post_hook()
        return "second"

    old = real(TEXTS)
    monkeypatch.setattr(service.model, "embed", slow)
    session.script = script
    with ThreadPoolExecutor(8) as pool:
        early = pool.submit(post, url, "/embed", {"input": TEXTS})
        assert computing.wait(TIMEOUT)
        updating = pool.submit(update, url)
        assert connected.wait(TIMEOUT)
        assert get(url, "/v1/weights") == {"version": "first", "dirty": False}
        assert not half.is_set()  # nothing is loaded while a request computes
        compute.set()
        assert early.result(TIMEOUT).json() == {"embeddings": old, "version": "first"}
        assert half.wait(TIMEOUT)
        late: list[Future[httpx.Response]] = [pool.submit(post, url, "/embed", {"input": TEXTS}) for _ in range(3)]
        while service.gate.waiting < 3:
            assert get(url, "/v1/weights") == {"version": "first", "dirty": True}
        assert get(url, "/health") == {"status": "ok"}
        finish.set()
        updating.result(TIMEOUT)
        for answer in late:
            assert answer.result(TIMEOUT).json() == {"embeddings": ServedModel.load(bert).embed(TEXTS), "version": "second"}


def test_failure_before_the_first_byte_leaves_the_engine_serving(engine: tuple[EmbeddedEngine, str], session: Session) -> None:
    url = engine[1]

    def script(run: Load, post_hook: Callable[[], None]) -> str:
        raise OSError("nobody there")

    session.script = script
    with pytest.raises(EngineRefusedError, match=r"400.*nobody there"):
        update(url)
    session.script = whole({"unheard.of": torch.zeros(1)}, "x")
    with pytest.raises(EngineRefusedError, match=r"400.*unheard\.of"):
        update(url)
    with get_engine("sglang", url) as client:
        assert client.weights() == Weights("first", False)
    assert post(url, "/embed", {"input": TEXTS}).json()["version"] == "first"


@pytest.mark.parametrize("fails_in", ["load", "post_hook", "elsewhere"])
def test_dirty_until_a_complete_update(engine: tuple[EmbeddedEngine, str], session: Session, bert: Path, fails_in: str) -> None:
    url = engine[1]
    checkpoint = read_checkpoint(bert)
    pairs = list(checkpoint.items())

    def script(run: Load, post_hook: Callable[[], None]) -> str:
        run(pairs[:3])
        if fails_in == "load":
            run([("unheard.of", torch.zeros(1))])
        if fails_in == "post_hook":
            post_hook()
        raise OSError("rank 1 said: elsewhere")

    session.script = script
    message = {"load": "unheard.of", "post_hook": "lacks", "elsewhere": "elsewhere"}[fails_in]
    with pytest.raises(EngineRefusedError, match=message):
        update(url)
    assert get(url, "/v1/weights") == {"version": "first", "dirty": True}
    for _ in range(2):
        refused = post(url, "/embed", {"input": TEXTS})
        assert refused.status_code == 503 and message in refused.json()["detail"]
    assert get(url, "/health") == get(url, "/ping") == {"status": "ok"}
    session.script = whole(checkpoint, "healed")
    update(url)
    healed = post(url, "/embed", {"input": TEXTS}).json()
    assert healed == {"embeddings": ServedModel.load(bert).embed(TEXTS), "version": "healed"}


def test_two_updates_at_once(engine: tuple[EmbeddedEngine, str], session: Session, bert: Path) -> None:
    url = engine[1]
    connected, finish = threading.Event(), threading.Event()
    complete = whole(read_checkpoint(bert), "second")

    def script(run: Load, post_hook: Callable[[], None]) -> str:
        connected.set()
        assert finish.wait(TIMEOUT)
        return complete(run, post_hook)

    session.script = script
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(update, url)
        assert connected.wait(TIMEOUT)
        with pytest.raises(EngineRefusedError, match="already updating"):
            update(url)
        finish.set()
        first.result(TIMEOUT)
    assert get(url, "/v1/weights") == {"version": "second", "dirty": False}


def test_bad_requests(engine: tuple[EmbeddedEngine, str], session: Session) -> None:
    url = engine[1]
    assert post(url, "/embed", {"input": []}).status_code == 422
    assert post(url, "/embed", {}).status_code == 422
    assert post(url, "/embed", {"input": [[1, 99]]}).status_code == 400
    assert post(url, "/generate", {"text": "a"}).status_code == 400
    assert post(url, "/update_weights_from_ipc", {"zmq_handles": {}}).status_code == 422
    answer = post(url, "/update_weights_from_ipc", {"zmq_handles": {"a": "b", "c": "d"}})
    assert answer.status_code == 400 and answer.json()["success"] is False
    answer = post(url, "/update_weights_from_ipc", {"zmq_handles": {"a": "b"}, "worker_index": 1})
    assert answer.status_code == 400 and "worker 1" in answer.json()["message"]
    assert session.handles == []


def test_generate(tmp_path: Path, session: Session) -> None:
    directory = save_llama(tmp_path)
    engine = EmbeddedEngine(ServedModel.load(directory, "dummy"), session)
    with serving(engine) as url:
        session.script = whole(read_checkpoint(directory), "v")
        update(url)
        body = {"input_ids": [3, 4, 5], "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
        answer = post(url, "/generate", body).json()
        assert post(url, "/generate", {"text": "a"}).status_code == 400  # no tokenizer
        assert post(url, "/generate", {}).status_code == 422
        several = {"input_ids": [[3, 4, 5], [6]], "sampling_params": {"max_new_tokens": 8, "temperature": 1, "sampling_seed": 5}}
        sampled = post(url, "/generate", several).json()
        assert post(url, "/generate", several).json() == sampled and [a["version"] for a in sampled] == ["v", "v"]
        assert post(url, "/generate", {"input_ids": [3], "sampling_params": {"temperature": -1}}).status_code == 422
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    expected = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    assert answer == {"output_ids": expected, "text": None, "version": "v"}


@pytest.fixture
def replica(bert: Path) -> Iterator[tuple[list[Session], list[str]]]:
    """A leader with two followers: their senders and URLs, the leader's first."""
    sessions = [Session() for _ in range(3)]
    models = [ServedModel.load(bert, "dummy") for _ in range(3)]
    with (
        serving(EmbeddedEngine(models[1], sessions[1])) as one,
        serving(EmbeddedEngine(models[2], sessions[2])) as two,
        serving(EmbeddedEngine(models[0], sessions[0], followers=[one, two + "/"])) as leader,
    ):
        yield sessions, [leader, one, two]


HANDLES = [("z", "ipc:///0"), ("b", "ipc:///1"), ("a", "ipc:///2")]


def test_a_leader_updates_its_followers_at_the_same_time(replica: tuple[list[Session], list[str]], bert: Path) -> None:
    sessions, urls = replica
    together = threading.Barrier(3)
    complete = whole(read_checkpoint(bert), "v")

    def script(run: Load, post_hook: Callable[[], None]) -> str:
        together.wait(TIMEOUT)
        return complete(run, post_hook)

    for session in sessions:
        session.script = script
    with get_engine("sglang", urls[0]) as client:
        client.wait_ready(TIMEOUT)
        client.update(HANDLES, version="v", seconds=TIMEOUT)
    assert [s.handles for s in sessions] == [["ipc:///0"], ["ipc:///1"], ["ipc:///2"]]
    assert [get(url, "/v1/weights")["version"] for url in urls] == ["v"] * 3


def test_a_followers_failure_is_named(replica: tuple[list[Session], list[str]], bert: Path) -> None:
    sessions, urls = replica
    for session in sessions:
        session.script = whole(read_checkpoint(bert), "v")
    sessions[2].script = whole({"unheard.of": torch.zeros(1)}, "v")
    with get_engine("sglang", urls[0]) as client, pytest.raises(EngineRefusedError, match=rf"{urls[2]}.*unheard\.of"):
        client.update(HANDLES, version="v", seconds=TIMEOUT)


def test_a_leader_is_not_ready_without_its_followers(bert: Path, session: Session) -> None:
    model = ServedModel.load(bert, "dummy")
    with (
        answering(lambda *_: (500, b"")) as broken,
        serving(EmbeddedEngine(model, session, followers=[broken])) as url,
    ):
        answer = httpx.get(url + "/ping", timeout=TIMEOUT, trust_env=False)
        assert answer.status_code == 502 and broken in answer.text
        assert get(url, "/health") == {"status": "ok"}
