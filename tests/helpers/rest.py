"""Fleets that serve REST, as `checkpoint-engine serve` under torchrun, and engines that wait until a test lets them go on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx

from helpers.ranks import Ranks, _context, start_ranks

SECONDS = 20.0


class _Lines(io.TextIOBase):
    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def write(self, text: str) -> int:
        if text.strip():
            self._pipe.send(text.strip())
        return len(text)


def _serve(rank: int, world_size: int, arguments: list[str], pipes: list[Connection]) -> int:
    from checkpoint_engine import cli

    with redirect_stdout(_Lines(pipes[rank])):
        return cli.run([word.replace("RANK", str(rank)) for word in arguments])


class Served:
    """urls: where ranks listen, by rank; None where only rank 0 may ask."""

    def __init__(self, ranks: Ranks, urls: list[str]) -> None:
        self.ranks, self.urls = ranks, urls

    @property
    def url(self) -> str:
        return self.urls[0]

    def client(self, rank: int = 0, **options: Any) -> httpx.Client:
        url = self.urls[rank]
        if url.startswith("unix:"):
            transport = httpx.HTTPTransport(uds=url.removeprefix("unix:"))
            return httpx.Client(base_url="http://localhost", transport=transport, timeout=SECONDS, **options)
        return httpx.Client(base_url=url, trust_env=False, timeout=SECONDS, **options)


@contextlib.contextmanager
def serving(
    world_size: int, *arguments: str, env: dict[str, str] | None = None, may_die: Collection[int] = (), seconds: float = 50.0
) -> Iterator[Served]:
    """`checkpoint-engine serve ARGUMENTS` on every rank, ended by SIGTERM. All ranks have met."""
    own = ["serve", *(arguments or ("--port", "0"))]
    pipes = [_context.Pipe(duplex=False) for _ in range(world_size)]
    sockets = tempfile.mkdtemp(prefix="ce-", dir="/tmp")
    everywhere = {
        "CHECKPOINT_ENGINE_DEVICE": "cpu",
        "CHECKPOINT_ENGINE_SOCKET_DIR": sockets,
        "CHECKPOINT_ENGINE_JOIN_TIMEOUT": "20",
        "CHECKPOINT_ENGINE_MAP_REGIONS": "0",
        **(env or {}),
    }
    listening = world_size if "--uds" in own else 1
    with start_ranks(_serve, world_size, own, [theirs for _, theirs in pipes], env=everywhere, may_die=may_die) as ranks:
        for _, theirs in pipes:
            theirs.close()
        urls = [_url(mine, seconds) for mine, _ in pipes[:listening]]
        served = Served(ranks, urls)
        yield served
        for rank in range(world_size):
            with contextlib.suppress(ProcessLookupError):
                ranks.kill(rank, signal.SIGTERM)
        codes = ranks.results()
        assert [c for r, c in enumerate(codes) if r not in may_die] == [128 + signal.SIGTERM] * (world_size - len(may_die)), codes
    for mine, _ in pipes:
        mine.close()
    if not may_die:
        os.rmdir(sockets)  # empty: nothing is left behind
    shutil.rmtree(sockets, ignore_errors=True)


def _url(pipe: Connection, seconds: float) -> str:
    if not pipe.poll(seconds):
        raise TimeoutError(f"no rank listens after {seconds} s")
    line: str = pipe.recv()
    return line.removeprefix("listening on ")


def events(response: httpx.Response) -> Iterator[tuple[str, Any]]:
    """(event, data) of a stream of server-sent events."""
    kind = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield kind, json.loads(line.removeprefix("data: "))


def wait_until_met(client: httpx.Client, world_size: int) -> None:
    until(client, "/v1/events", lambda data: isinstance(data, dict) and data["met"] and len(data["ranks"]) == world_size)


def until(client: httpx.Client, path: str, fits: Callable[[Any], bool]) -> Any:
    """The answer of a stream of events at `path` for which `fits` holds."""
    with client.stream("GET", path) as response:
        response.raise_for_status()
        for _, data in events(response):
            if fits(data):
                return data
    raise AssertionError(f"{path} ended before that")


def follow(client: httpx.Client, id_: str) -> Any:
    """The record of an update that is over."""
    return until(client, f"/v1/updates/{id_}/events", lambda record: record["state"] not in ("starting", "updating"))


@contextlib.contextmanager
def gated(url: str) -> Iterator[tuple[str, threading.Event, threading.Event]]:
    """An engine in front of the one at `url`: yields its URL, an event that is set when it has been asked to update, and one
    for which it waits before it passes that on."""
    from embedded_support import answering

    asked, may = threading.Event(), threading.Event()

    def answer(method: str, path: str, body: bytes) -> tuple[int, bytes]:
        if path == "/update_weights_from_ipc":
            asked.set()
            may.wait(SECONDS)
        with httpx.Client(trust_env=False, timeout=SECONDS) as client:
            response = client.request(method, url + path, content=body, headers={"content-type": "application/json"})
        return response.status_code, response.content

    try:
        with answering(answer) as front:
            yield front, asked, may
    finally:
        may.set()


def engine_bodies(urls: Sequence[str]) -> list[dict[str, str]]:
    return [{"kind": "sglang", "url": url} for url in urls]


def model_dir(path: Path, seed: int = 0) -> Path:
    from embedded_support import save_bert

    return save_bert(path, seed)
