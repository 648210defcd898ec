"""Updates of real embedded engines: what they answer meanwhile, and what an engine that misbehaves does to the others."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from checkpoint_engine import cli
from checkpoint_engine.engines import Weights, get_engine, request_for_rank
from checkpoint_engine.engines.sglang import SGLang
from checkpoint_engine.errors import UpdateError
from helpers.engines import engine_processes
from helpers.fleet import server
from helpers.ranks import run_ranks

# Ranks import this file: what takes seconds to import (transformers) is imported where it is used.
Kind = Callable[[], AbstractContextManager[str]]
RANKS = 2
SECONDS = 20.0
REQUESTS = 50


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


def files(models: list[Path]) -> list[str]:
    return [str(model / "model.safetensors") for model in models]


def _update(ps: Any, rank: int, file: str, version: str, urls: list[str]) -> UpdateError | None:
    """This rank's part of one update of the engines at `urls`. Returns the error it ended with."""
    clients = [get_engine("sglang", url) for url in urls]
    ps.register_checkpoint(version, files=[file], stripe=True)
    ps.gather_metas(version)
    try:
        ps.update(version, request_for_rank(clients, rank, len(urls), version=version, seconds=SECONDS), version=version)
    except UpdateError as e:
        return e
    finally:
        ps.unregister_checkpoint(version)
        for client in clients:
            client.close()
    return None


def _good_bad_good(rank: int, world_size: int, urls: list[str], bad: list[str], files: list[str], settings: Any) -> list[Any]:
    """Three updates, the second with the endpoints `bad`: how each ended, and this rank's engine after it."""
    seen = []
    with server(**settings) as ps, SGLang(urls[rank]) as own:
        own.wait_ready(SECONDS)
        for number, endpoints in enumerate((urls, bad, urls)):
            error = _update(ps, rank, files[number % 2], f"v{number}", endpoints)
            digests = own.request("GET", "/v1/parameters/digest", None, SECONDS).json()
            embedded = own.request("POST", "/embed", {"input": ["the cat sat"]}, SECONDS).json()["version"]
            seen.append((error and (error.rank, error.stage, str(error)), own.weights(), embedded, digests))
            ps.store_based_barrier()
    return seen


@contextmanager
def nobody() -> Iterator[str]:
    """The URL of a port that was taken and at which nobody listens."""
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def broken() -> AbstractContextManager[str]:
    """Says that it is ready; an update of it fails."""
    from embedded_support import answering

    return answering(lambda method, path, body: (200, b"") if method == "GET" else (500, b"out of memory"))


def liar() -> AbstractContextManager[str]:
    """Says at once that the update succeeded; its worker never connects."""
    from embedded_support import answering

    return answering(lambda method, path, body: (200, json.dumps({"success": True, "message": ""}).encode()))


def digests_of(model: Path) -> dict[str, str]:
    """What an engine that holds this checkpoint says of its parameters."""
    from checkpoint_engine.cli.demo.checkpoint import read_checkpoint
    from checkpoint_engine.engines.embedded.loader import expected_digests
    from checkpoint_engine.engines.embedded.model import ServedModel

    return expected_digests(ServedModel.load(model, "dummy").targets, read_checkpoint(model))


@pytest.mark.parametrize(
    ("kind", "place", "stage", "reason"),
    [
        (nobody, 1, "request", "engine at {url}: [Errno 111] Connection refused"),
        (broken, 0, "request", "engine at {url}: answered 500: out of memory"),
        (broken, 1, "request", "engine at {url}: answered 500: out of memory"),
        (liar, 1, "attach", "gave up after 0.5 s waiting for the workers of ranks [1] to connect"),
    ],
)
def test_one_engine_that_fails(engines: list[str], models: list[Path], kind: Kind, place: int, stage: str, reason: str) -> None:
    """The update of all fails, with one error on all ranks; no byte was loaded; the next update is as good as any."""
    with kind() as url:
        bad = [*engines]
        bad[place] = url
        results = run_ranks(_good_bad_good, RANKS, engines, bad, files(models), {"attach_timeout": 0.5, "bucket_bytes": 4096})
    expected = digests_of(models[0])
    errors = [seen[1][0] for seen in results]
    assert errors[0] == errors[1]  # the same on both ranks
    assert errors[0] is not None
    assert errors[0][:2] == (place, stage)
    assert reason.format(url=url) in errors[0][2]
    for good, failed, again in results:
        assert good == (None, Weights("v0", False), "v0", expected)
        assert failed[1:] == good[1:]  # it serves what it served
        assert again == (None, Weights("v2", False), "v2", expected)


def _command(rank: int, world_size: int, checkpoint: str, urls: list[str]) -> tuple[int, str]:
    """What `checkpoint-engine update` ends with and says, as torchrun would start it."""
    import io
    from contextlib import redirect_stderr

    endpoints = [word for url in urls for word in ("--endpoint", url)]
    with redirect_stderr(io.StringIO()) as said:
        code = cli.run(["update", "--checkpoint", checkpoint, *endpoints, "--inference-parallel-size", "1", "--wait", "0.2"])
    return code, said.getvalue()


@pytest.mark.parametrize(
    ("kind", "good", "code", "reason"),
    [
        (nobody, 0, 3, "Connection refused"),
        (broken, 1, 1, "answered 500: out of memory"),
    ],
)
def test_exit_code_and_one_line(engines: list[str], models: list[Path], kind: Kind, good: int, code: int, reason: str) -> None:
    """`good` engines before the bad one. Unreachable, which is known before the update: 3. Failed in the update: 1."""
    with kind() as url:
        results = run_ranks(_command, good + 1, str(models[0]), [*engines[:good], url])
    assert [c for c, _ in results] == [code] * (good + 1)
    said = "".join(text for _, text in results)
    assert said.startswith("checkpoint-engine: error")
    assert said.count("\n") == 1
    assert f"engine at {url}: " in said
    assert reason in said


def _updates(rank: int, world_size: int, urls: list[str], files: list[str], count: int) -> list[Any]:
    with server(bucket_bytes=4096) as ps:
        return [_update(ps, rank, files[number % 2], f"r{number}", urls) for number in range(count)]


def test_requests_go_on_through_updates(engines: list[str], models: list[Path]) -> None:
    """Each answer is that of one version, whole; versions never go back; none fails."""
    from checkpoint_engine.engines.embedded.model import ServedModel

    texts = ["the cat sat on a mat", "a dog ran"]
    answers: list[tuple[str | None, list[list[float]]]] = []
    begun, ended = threading.Event(), threading.Event()

    def ask() -> None:
        with SGLang(engines[0]) as client:
            while not ended.is_set() or len(answers) < REQUESTS:
                answer = client.request("POST", "/embed", {"input": texts}, SECONDS).json()
                answers.append((answer["version"], answer["embeddings"]))
                begun.set()

    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            ask()
        except BaseException as e:
            failures.append(e)

    updates = 6
    client = threading.Thread(target=guarded)
    client.start()
    try:
        assert begun.wait(SECONDS)
        results = run_ranks(_updates, RANKS, engines, files(models), updates)
    finally:
        ended.set()
        client.join(SECONDS)
    assert results == [[None] * updates] * RANKS
    assert failures == []
    assert len(answers) >= REQUESTS
    versions = [version for version, _ in groupby(version for version, _ in answers)]
    every = [versions[0], *(f"r{number}" for number in range(updates))]
    assert versions == [version for version in every if version in versions]
    assert (versions[0], versions[-1]) == (every[0], every[-1])
    by_model = [ServedModel.load(model).embed(texts) for model in models]
    expected = dict(zip(every, [answers[0][1], *by_model * updates], strict=False))
    assert all(vectors == expected[version] for version, vectors in answers)
